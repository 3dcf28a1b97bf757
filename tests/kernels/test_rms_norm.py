import pytest
import torch
import torch.nn.functional as F

from flexft_kernels.rms_norm import rms_norm, rms_norm_backward

EPS = 1e-5
SHAPES = [(1, 1), (3, 17), (47, 123), (257, 64), (17, 3, 47)]  # (T, D), and (T, H, E)


def case(shape, dtype):
    x = (3 * torch.randn(shape)).to(dtype)
    weight = (1 + 0.3 * torch.randn(shape[-1])).to(dtype)
    dy = torch.randn(shape).to(dtype)
    with torch.enable_grad():
        x64 = x.double().requires_grad_()
        y64 = F.rms_norm(x64, shape[-1:], weight.double(), EPS)
        (dx64,) = torch.autograd.grad(y64, x64, dy.double())
    return x, weight, dy, y64.detach(), dx64


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_is_the_norm(shape, dtype, close):
    x, weight, _, y64, _ = case(shape, dtype)
    y = rms_norm(x, weight, EPS)
    assert y.dtype == dtype
    close(y, y64, dtype)


# Where D is 1 the gradient is nothing but cancellation.
@pytest.mark.parametrize("shape", SHAPES[1:], ids=str)
def test_backward_is_autograd(shape, dtype, close):
    x, weight, dy, _, dx64 = case(shape, dtype)
    dx = rms_norm_backward(dy, x, weight, EPS)
    assert dx.dtype == dtype
    close(dx, dx64, dtype)


def test_backward_writes_over_dy_and_keeps_fp32_beside_bf16_activations(close):
    x, weight, dy, _, dx64 = case((17, 47), torch.bfloat16)
    dy32 = dy.float()
    assert rms_norm_backward(dy32, x, weight, EPS, out=dy32) is dy32
    close(dy32, dx64, torch.float32)


def test_inputs_are_left_alone():
    x, weight, dy, _, _ = case((17, 47), torch.float32)
    before = x.clone(), dy.clone()
    rms_norm(x, weight, EPS)
    rms_norm_backward(dy, x, weight, EPS)
    assert torch.equal(x, before[0])
    assert torch.equal(dy, before[1])
