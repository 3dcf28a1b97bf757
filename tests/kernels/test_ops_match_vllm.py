"""What the backward recomputes must be what the server computed: compared with vLLM's own ops."""

import pytest
import torch

from flexft_kernels.rms_norm import rms_norm
from flexft_kernels.rope import apply_rope
from flexft_kernels.silu_mul import silu_mul

pytest.importorskip("vllm")

from vllm import _custom_ops as ops
from vllm import ir
from vllm.model_executor.layers.activation import SiluAndMul

HALF = [torch.bfloat16, torch.float16]


def test_rms_norm_is_vllms_bit_for_bit(dtype):
    x, weight = torch.randn(47, 123).to(dtype), torch.randn(123).to(dtype)
    assert torch.equal(rms_norm(x, weight, 1e-5), ir.ops.rms_norm(x, weight, 1e-5))


@pytest.mark.skipif(torch.cuda.is_available(), reason="compares with vLLM's CPU kernel")
@pytest.mark.parametrize("dtype", HALF)
def test_rope_is_vllms_bit_for_bit(dtype):
    q, k = torch.randn(47, 4, 64).to(dtype), torch.randn(47, 2, 64).to(dtype)
    cache = torch.randn(100, 64).to(dtype)
    positions = torch.randint(100, (47,))
    expected_q, expected_k = q.clone(), k.clone()
    ops.rotary_embedding(
        positions, expected_q.view(47, -1), expected_k.view(47, -1), 64, cache, True
    )
    assert torch.equal(apply_rope(q, cache[positions]), expected_q)
    assert torch.equal(apply_rope(k, cache[positions]), expected_k)


def test_silu_mul_is_vllms_bit_for_bit(dtype):
    gate_up = torch.randn(47, 246).to(dtype)
    assert torch.equal(silu_mul(gate_up), SiluAndMul.forward_native(gate_up))
