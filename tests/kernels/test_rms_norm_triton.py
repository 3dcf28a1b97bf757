import pytest
import torch
import torch.nn.functional as F

from flexft_kernels import rms_norm
from flexft_kernels.rms_norm_triton import rms_norm_backward

EPS = 1e-5
SHAPES = [(3, 17), (47, 123), (2, 5000), (17, 3, 47)]  # (T, D), and (T, H, E)


def case(shape, dtype, device):
    x = (3 * torch.randn(shape)).to(device, dtype)
    weight = (1 + 0.3 * torch.randn(shape[-1])).to(device, dtype)
    dy = torch.randn(shape).to(device, dtype)
    with torch.enable_grad():
        x64 = x.double().requires_grad_()
        y64 = F.rms_norm(x64, shape[-1:], weight.double(), EPS)
        (dx64,) = torch.autograd.grad(y64, x64, dy.double())
    return x, weight, dy, dx64


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_backward_is_autograd(shape, dtype, device, close):
    x, weight, dy, dx64 = case(shape, dtype, device)
    dx = rms_norm_backward(dy, x, weight, EPS)
    assert dx.dtype == dtype
    close(dx, dx64, dtype)


def test_the_residuals_gradient_is_added_before_rounding(device, close):
    x, weight, dy, dx64 = case((47, 33), torch.bfloat16, device)
    skip, out = torch.randn(2, 47, 33, device=device)
    for op in (rms_norm_backward, rms_norm.rms_norm_backward):
        assert op(dy, x, weight, EPS, out=out, skip=skip) is out
        close(out, dx64 + skip, torch.float32)
    assert rms_norm_backward(dy, x, weight, EPS, out=skip, skip=skip) is skip
    close(skip, out.double(), torch.float32)


def test_heads_of_a_merged_projection_are_accepted(device, close):
    x, weight, dy, dx64 = case((17, 3, 16), torch.float32, device)
    merged = torch.full((17, 5, 16), torch.nan, device=device)
    merged[:, 1:4] = x
    dy32 = dy.clone()
    assert rms_norm_backward(dy32, merged[:, 1:4], weight, EPS, out=dy32) is dy32
    close(dy32, dx64, torch.float32)
