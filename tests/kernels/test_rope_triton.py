import pytest
import torch

from flexft_kernels import rope
from flexft_kernels.rope_triton import apply_rope, rope_backward

SHAPES = [(1, 1, 2, 2), (3, 4, 64, 64), (47, 3, 34, 16), (80, 5, 17, 6)]  # (T, H, E, rotary)


def inputs(shape, dtype, device):
    tokens, heads, head_dim, rotary_dim = shape
    x = torch.randn(tokens, heads, head_dim).to(device, dtype)
    angles = 10 * torch.rand(tokens, rotary_dim // 2)
    return x, torch.cat((angles.cos(), angles.sin()), dim=-1).to(device, dtype)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("op", [apply_rope, rope_backward])
def test_pairs_are_rotated_as_complex_numbers(op, shape, in_place, dtype, device, close):
    x, cos_sin = inputs(shape, dtype, device)
    rotary_dim = shape[3]
    turn = torch.complex(*cos_sin.double().chunk(2, dim=-1))[:, None]
    z = torch.complex(*x[..., :rotary_dim].double().chunk(2, dim=-1))
    z = z * (turn if op is apply_rope else turn.conj())
    expected = torch.cat((z.real, z.imag, x[..., rotary_dim:].double()), dim=-1)
    close(op(x, cos_sin, out=x if in_place else None), expected, dtype)


def test_a_slice_of_a_merged_projection_and_fp32_beside_a_bf16_cache(device, close):
    x, cos_sin = inputs((17, 3, 16, 16), torch.float32, device)
    cos_sin = cos_sin.bfloat16()
    merged = torch.zeros(17, 5, 16, device=device)
    merged[:, 1:4] = x
    expected = rope.rope_backward(x.double(), cos_sin.double())
    close(rope_backward(merged[:, 1:4], cos_sin), expected, torch.float32)
