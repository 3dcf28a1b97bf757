"""The op `vllm_flexft::capture` in eager and compiled models."""

import pytest
import torch
from torch import nn

from vllm_flexft.runner.capture_op import Sites


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


def place(model):
    sites = Sites()
    for i, layer in enumerate(model.layers):
        sites.place((i, "after"), layer.linear, output_of)
        sites.place((i, "before"), layer.norm, input_of, before=True)
    return sites


def watch(sites, seen):
    """Listen everywhere; what ends it."""
    return [
        sites.listen(key, lambda x, key=key: seen.update({key: x.clone()})) for key in sites.keys
    ]


@pytest.fixture
def models():
    """The same model twice, and the ops in the second."""
    torch.manual_seed(0)
    plain, model = Model().requires_grad_(False), Model().requires_grad_(False)
    model.load_state_dict(plain.state_dict())
    yield plain, model, place(model)
    Sites.close()


def seen_by_hooks(model, x):
    """What forward hooks see, which an uncompiled model calls."""
    seen = {}
    for i, layer in enumerate(model.layers):
        layer.linear.register_forward_hook(
            lambda _, args, output, i=i: seen.update({(i, "after"): output.clone()})
        )
        layer.norm.register_forward_pre_hook(
            lambda _, args, i=i: seen.update({(i, "before"): args[0].clone()})
        )
    model(x)
    for layer in model.layers:
        layer.linear._forward_hooks.clear()
        layer.norm._forward_pre_hooks.clear()
    return seen


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_a_compiled_model_computes_the_same_bits_and_is_listened_to(models, backend):
    plain, model, sites = models
    x, seen = torch.randn(5, 8), {}
    expected = seen_by_hooks(plain, x)
    compiled_plain, compiled = (
        torch.compile(m, backend=backend, fullgraph=True, dynamic=True) for m in (plain, model)
    )
    assert torch.equal(compiled(x), compiled_plain(x))
    ends = watch(sites, seen)
    with torch.compiler.set_stance("fail_on_recompile"):
        compiled(x)
        assert not seen, "the sites are not open"
        sites.open()
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


def test_an_uncompiled_model_is_listened_to(models):
    plain, model, sites = models
    x, seen = torch.randn(5, 8), {}
    watch(sites, seen)
    sites.open()
    assert torch.equal(model(x), plain(x))
    for key, expected in seen_by_hooks(plain, x).items():
        assert torch.equal(seen[key], expected)


def test_code_compiled_of_one_model_serves_another_placed_alike(models):
    """As code from a cache does, which another process compiled: sites go by their number."""
    _, model, sites = models
    other = Model().requires_grad_(False)
    other.load_state_dict(model.state_dict())
    seen, seen_there = {}, {}
    watch(sites, seen)
    watch(place(other), seen_there)
    compiled = torch.compile(other, backend="eager", fullgraph=True, dynamic=True)
    sites.open()
    compiled(torch.randn(5, 8))
    assert len(seen) == 4
    assert not seen_there


def test_the_state_of_a_module_is_not_changed_by_the_op(models):
    plain, model, sites = models
    assert model.state_dict().keys() == plain.state_dict().keys()
    with pytest.raises(AssertionError):
        sites.place((0, "after"), model.layers[0].linear, output_of)
