import pytest
import torch
import torch.nn.functional as F

from flexft_kernels import silu_mul as module
from flexft_kernels.silu_mul import silu_mul, silu_mul_backward

SHAPES = [(1, 1), (3, 17), (47, 123), (123, 257), (257, 1031)]  # (T, F); the last spans blocks


def case(shape, dtype):
    tokens, width = shape
    gate_up = (3 * torch.randn(tokens, 2 * width)).to(dtype)
    dact = torch.randn(tokens, width).to(dtype)
    with torch.enable_grad():
        x64 = gate_up.double().requires_grad_()
        act64 = F.silu(x64[:, :width]) * x64[:, width:]
        (dx64,) = torch.autograd.grad(act64, x64, dact.double())
    return gate_up, dact, act64.detach(), dx64


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_is_swiglu(shape, dtype, close):
    gate_up, _, act64, _ = case(shape, dtype)
    close(silu_mul(gate_up), act64, dtype)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_backward_is_autograd(shape, dtype, close):
    gate_up, dact, _, dx64 = case(shape, dtype)
    close(silu_mul_backward(dact, gate_up), dx64, dtype)


def test_results_go_to_out():
    gate_up, dact, _, _ = case((47, 17), torch.float32)
    act, dx = torch.empty(47, 17), torch.empty(47, 34)
    assert silu_mul(gate_up, out=act) is act
    assert silu_mul_backward(dact, gate_up, out=dx) is dx
    assert torch.equal(act, silu_mul(gate_up))
    assert torch.equal(dx, silu_mul_backward(dact, gate_up))


def test_the_block_size_does_not_change_a_bit(monkeypatch):
    gate_up, dact, _, _ = case((47, 123), torch.bfloat16)
    whole = silu_mul(gate_up), silu_mul_backward(dact, gate_up)
    monkeypatch.setattr(module, "_BLOCK_ELEMENTS", 1)
    assert torch.equal(silu_mul(gate_up), whole[0])
    assert torch.equal(silu_mul_backward(dact, gate_up), whole[1])


def test_large_gates_do_not_overflow():
    gate_up = torch.tensor([[-1e4, 1e4, 2.0, 3.0]])
    dx = silu_mul_backward(torch.ones(1, 2), gate_up)
    assert torch.equal(dx, torch.tensor([[0.0, 3.0, 0.0, 1e4]]))
