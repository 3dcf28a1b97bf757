"""The op `vllm_flexft::capture` in eager and compiled models."""

import pytest
import torch
from torch import nn

from vllm_flexft.runner.capture_op import listen, place


class Layer(nn.Module):
    """As a decoder layer: the residual stream runs past a norm and a linear."""

    def __init__(self):
        super().__init__()
        self.norm, self.linear = nn.RMSNorm(8), nn.Linear(8, 8)

    def forward(self, x, residual):
        residual = x + residual
        return self.linear(self.norm(residual)).sin(), residual


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(2))

    def forward(self, x):
        residual = torch.zeros_like(x)
        for layer in self.layers:
            x, residual = layer(x, residual)
        return x + residual


def output_of(_args, output):
    return output


def input_of(args, _output):
    return args[0]


def watch(model, seen):
    """Listen at every linear's output and norm's input; what ends it."""
    ends = []
    for i, layer in enumerate(model.layers):
        for name, module, pick in (
            ("after", layer.linear, output_of),
            ("before", layer.norm, input_of),
        ):
            ends.append(
                listen(
                    module,
                    name,
                    pick,
                    lambda x, key=(i, name): seen.update({key: x.clone()}),
                    before=name == "before",
                )
            )
    return ends


@pytest.fixture
def models():
    """The same model twice; the second has ops in it."""
    torch.manual_seed(0)
    plain, model = Model().requires_grad_(False), Model().requires_grad_(False)
    model.load_state_dict(plain.state_dict())
    for layer in model.layers:
        place(layer.linear, "after", output_of)
        place(layer.norm, "before", input_of, before=True)
    return plain, model


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_a_compiled_model_computes_the_same_bits_and_is_listened_to(models, backend):
    plain, model = models
    x, expected, seen = torch.randn(5, 8), {}, {}
    ends = watch(plain, expected)
    plain(x)
    for end in ends:
        end()
    compiled_plain, compiled = (
        torch.compile(m, backend=backend, fullgraph=True, dynamic=True) for m in models
    )
    assert torch.equal(compiled(x), compiled_plain(x))
    ends = watch(model, seen)
    with torch.compiler.set_stance("fail_on_recompile"):
        assert torch.equal(compiled(x), compiled_plain(x))
        assert seen.keys() == expected.keys()
        assert len(seen) == 4
        for key, tensor in seen.items():
            torch.testing.assert_close(tensor, expected[key], atol=1e-6, rtol=1e-6)
        seen.clear()
        for end in ends:
            end()
        compiled(x)
        assert not seen


def test_the_state_of_a_module_is_not_changed_by_the_op(models):
    plain, model = models
    assert model.state_dict().keys() == plain.state_dict().keys()
    with pytest.raises(AssertionError):
        place(model.layers[0].linear, "after", output_of)
