import pytest
import torch
import torch.nn.functional as F

from flexft_kernels.lora import Lora, lora_backward

SHAPES = [(1, 3, 17, 1), (3, 17, 3, 2), (47, 123, 257, 8), (257, 47, 17, 16)]  # (T, I, O, R)
SCALING = 1.7


def case(shape, dtype):
    tokens, width_in, width_out, rank = shape
    x = torch.randn(tokens, width_in).to(dtype)
    dy = torch.randn(tokens, width_out).to(dtype)
    a = torch.randn(rank, width_in).to(dtype)
    b = torch.randn(width_out, rank).to(dtype)
    with torch.enable_grad():
        leaves = [t.double().requires_grad_() for t in (x, a, b)]
        x64, a64, b64 = leaves
        y = SCALING * F.linear(F.linear(x64, a64), b64)
        dx64, da64, db64 = torch.autograd.grad(y, leaves, dy.double())
    return dy, x, a, b, dx64, da64, db64


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients_of_a_and_b_are_autograd_in_fp32_for_any_operand(shape, dtype, close):
    dy, x, a, b, _, da64, db64 = case(shape, dtype)
    da, db = torch.zeros(a.shape), torch.zeros(b.shape)
    lora_backward(dy, x, Lora(a, b, da, db, SCALING), None)
    close(da, da64, torch.float32)
    close(db, db64, torch.float32)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradient_of_the_input_is_autograd(shape, dtype, close):
    dy, x, a, b, dx64, _, _ = case(shape, dtype)
    dx = torch.zeros(x.shape, dtype=dtype)
    lora = Lora(a, b, torch.zeros(a.shape), torch.zeros(b.shape), SCALING)
    lora_backward(dy, x, lora, dx)
    close(dx, dx64, dtype)


def test_every_gradient_is_added_to_what_is_there(close):
    dy, x, a, b, dx64, da64, db64 = case((47, 123, 17, 3), torch.float32)
    start = [torch.randn(g.shape) for g in (da64, db64, dx64)]
    grads = [s.clone() for s in start]
    da, db, dx = grads
    lora_backward(dy, x, Lora(a, b, da, db, SCALING), dx)
    for grad, before, expected in zip(grads, start, (da64, db64, dx64), strict=True):
        close(grad, before.double() + expected, torch.float32)


def test_windows_of_bf16_tokens_add_up_without_loss(close):
    """4096 tokens in 32 windows: in bf16 the sums would stop growing after some hundred."""
    dy, x, a, b, _, da64, db64 = case((4096, 17, 47, 3), torch.bfloat16)
    dy, x = dy.abs(), x.abs()
    with torch.enable_grad():
        a64, b64 = a.double().requires_grad_(), b.double().requires_grad_()
        y = SCALING * F.linear(F.linear(x.double(), a64), b64)
        da64, db64 = torch.autograd.grad(y, (a64, b64), dy.double())
    da, db = torch.zeros(a.shape), torch.zeros(b.shape)
    for rows in torch.arange(4096).split(128):
        lora_backward(dy[rows], x[rows], Lora(a, b, da, db, SCALING), None)
    close(da, da64, torch.float32)
    close(db, db64, torch.float32)


def test_a_part_of_a_merged_projection_is_accepted(close):
    dy, x, a, b, _, da64, db64 = case((17, 47, 16, 3), torch.float32)
    merged = torch.randn(17, 48)
    merged[:, 16:32] = dy
    da, db = torch.zeros(a.shape), torch.zeros(b.shape)
    lora_backward(merged[:, 16:32], x, Lora(a, b, da, db, SCALING), None)
    close(da, da64, torch.float32)
    close(db, db64, torch.float32)
