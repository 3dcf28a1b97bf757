import pytest
import torch

from flexft_kernels.rope import apply_rope, rope_backward


def case(tokens, heads, head_dim, rotary_dim, dtype):
    x = torch.randn(tokens, heads, head_dim).to(dtype)
    dy = torch.randn(tokens, heads, head_dim).to(dtype)
    angles = 10 * torch.rand(tokens, rotary_dim // 2)
    cos_sin = torch.cat((angles.cos(), angles.sin()), dim=-1).to(dtype)
    with torch.enable_grad():
        x64 = x.double().requires_grad_()
        # Each pair (i, i + rotary_dim / 2) is a complex number times cos + i sin.
        rotated, passed = x64[..., :rotary_dim], x64[..., rotary_dim:]
        z = torch.complex(*rotated.chunk(2, dim=-1))
        z = z * torch.complex(*cos_sin.double().chunk(2, dim=-1))[:, None]
        y64 = torch.cat((z.real, z.imag, passed), dim=-1)
        (dx64,) = torch.autograd.grad(y64, x64, dy.double())
    return x, dy, cos_sin, y64.detach(), dx64


SHAPES = [(1, 1, 2, 2), (3, 4, 64, 64), (47, 3, 34, 16), (257, 12, 17, 6)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("in_place", [False, True])
def test_forward_rotates_pairs(shape, in_place, dtype, close):
    x, _, cos_sin, y64, _ = case(*shape, dtype)
    close(apply_rope(x, cos_sin, out=x if in_place else None), y64, dtype)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("in_place", [False, True])
def test_backward_is_autograd(shape, in_place, dtype, close):
    _, dy, cos_sin, _, dx64 = case(*shape, dtype)
    close(rope_backward(dy, cos_sin, out=dy if in_place else None), dx64, dtype)


def test_fp32_gradients_stay_fp32_beside_a_bf16_cache(close):
    _, dy, cos_sin, _, dx64 = case(17, 3, 16, 16, torch.bfloat16)
    close(rope_backward(dy.float(), cos_sin), dx64, torch.float32)


def test_a_slice_of_a_merged_projection_is_accepted(close):
    x, _, cos_sin, y64, _ = case(17, 3, 16, 16, torch.float32)
    merged = torch.zeros(17, 5, 16)
    merged[:, 1:4] = x
    close(apply_rope(merged[:, 1:4], cos_sin), y64, torch.float32)
