"""The weight of a linear that vLLM has repacked, found by probing, is the plain weight."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from vllm_flexft.runner.base_weight import input_grad_of, probe_weight

LINEARS = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")


def base_linear(bench: Any, name: str) -> Any:
    layer = bench.runner.get_model().model.layers[1]
    parent = layer.self_attn if name in ("qkv_proj", "o_proj") else layer.mlp
    return getattr(parent, name).base_layer


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["llama", "qwen2"])  # qwen2: qkv_proj has a bias
@pytest.mark.parametrize("name", LINEARS)
def test_probed_weight_is_the_plain_weight_to_the_bit(family, dtype, name, bench):
    base = base_linear(bench(family, dtype), name)
    assert (name == "qkv_proj" and family == "qwen2") == (base.bias is not None)
    with torch.inference_mode():
        assert torch.equal(probe_weight(base), base.flexft_weight)


@pytest.mark.parametrize("name", LINEARS)
def test_input_gradient_is_dy_times_the_plain_weight(name, bench):
    base = base_linear(bench("llama"), name)
    plain = base.flexft_weight
    dy = torch.randn(5, plain.shape[0], generator=torch.Generator().manual_seed(0))
    assert torch.equal(input_grad_of(base)(dy), dy @ plain)


def test_input_gradient_of_a_layer_without_a_plain_weight_is_probed(bench, monkeypatch):
    base = base_linear(bench("llama"), "down_proj")
    plain = base.flexft_weight
    monkeypatch.delattr(base, "flexft_weight")
    assert base.weight.numel() == 0, "oneDNN has packed it away"
    dy = torch.randn(5, plain.shape[0], generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert torch.equal(input_grad_of(base)(dy), dy @ plain)
