"""The plain weight stays reachable, and the layer computes what it did."""

import pytest
import torch
from vllm.model_executor.layers import utils

from flexft_patches import cpu_weights

cpu_weights.install()


class Layer(torch.nn.Module):
    def __init__(self, dtype):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(48, 32).to(dtype), requires_grad=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_keeps_its_plain_weight_and_its_output(dtype):
    layer = Layer(dtype)
    plain, x = layer.weight.data.clone(), torch.randn(5, 32).to(dtype)
    utils.dispatch_cpu_unquantized_gemm(layer, remove_weight=True)
    assert torch.equal(layer.flexft_weight, plain)
    expected = torch.nn.functional.linear(x, plain)
    torch.testing.assert_close(layer.cpu_linear(x, layer.weight, None), expected)


def test_vllm_drops_its_own_reference_as_before():
    layer = Layer(torch.float32)
    utils.dispatch_cpu_unquantized_gemm(layer, remove_weight=True)
    assert layer.weight.numel() == 0


def test_embedding_weight_is_not_copied():
    layer = Layer(torch.float32)
    utils.dispatch_cpu_unquantized_gemm(layer, remove_weight=False)
    assert layer.flexft_weight.data_ptr() == layer.weight.data_ptr()


def test_plain_weight_is_no_parameter_and_not_in_the_state_dict():
    layer = Layer(torch.float32)
    utils.dispatch_cpu_unquantized_gemm(layer, remove_weight=True)
    assert list(layer.state_dict()) == ["weight"]
    assert [name for name, _ in layer.named_parameters()] == ["weight"]
