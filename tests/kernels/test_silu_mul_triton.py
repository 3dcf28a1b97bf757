import pytest
import torch
import torch.nn.functional as F

from flexft_kernels.silu_mul_triton import silu_mul_backward

SHAPES = [(1, 1), (3, 17), (5, 123), (2, 1031)]  # (T, F); the last spans blocks


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_backward_is_autograd(shape, dtype, device, close):
    tokens, width = shape
    gate_up = (3 * torch.randn(tokens, 2 * width)).to(device, dtype)
    dact = torch.randn(tokens, width).to(device, dtype)
    with torch.enable_grad():
        x64 = gate_up.double().requires_grad_()
        act64 = F.silu(x64[:, :width]) * x64[:, width:]
        (dx64,) = torch.autograd.grad(act64, x64, dact.double())
    out = torch.empty_like(gate_up)
    assert silu_mul_backward(dact, gate_up, out=out) is out
    close(out, dx64, dtype)


def test_large_gates_do_not_overflow(device):
    gate_up = torch.tensor([[-1e4, 1e4, 2.0, 3.0]], device=device)
    dx = silu_mul_backward(torch.ones(1, 2, device=device), gate_up)
    assert torch.equal(dx.cpu(), torch.tensor([[0.0, 3.0, 0.0, 1e4]]))
