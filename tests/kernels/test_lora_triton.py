import pytest
import torch
import torch.nn.functional as F

from flexft_kernels import lora
from flexft_kernels.lora import Lora
from flexft_kernels.lora_triton import grouped_lora_backward, lora_backward

# t and u are rounded before the second GEMM: 2⁻⁹ each in bf16, 2⁻¹² in fp16.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
SHAPES = [(1, 3, 17, 1), (47, 23, 131, 8), (70, 600, 19, 33)]  # (T, I, O, R)
SCALING = 1.7


def inputs(shape, dtype, device):
    tokens, width_in, width_out, rank = shape
    sizes = [(tokens, width_out), (tokens, width_in), (rank, width_in), (width_out, rank)]
    return [torch.randn(size).to(device, dtype) for size in sizes]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients_are_autograd_and_added_to_what_is_there(shape, dtype, device, max_rel):
    dy, x, a, b = inputs(shape, dtype, device)
    with torch.enable_grad():
        leaves = [t.double().requires_grad_() for t in (a, b, x)]
        y = SCALING * F.linear(F.linear(leaves[2], leaves[0]), leaves[1])
        expected = torch.autograd.grad(y, leaves, dy.double())
    start = [torch.randn(a.shape), torch.randn(b.shape), torch.randn(x.shape).to(dtype)]
    grads = [t.to(device, copy=True) for t in start]
    da, db, dx = grads
    lora_backward(dy, x, Lora(a, b, da, db, SCALING), dx)
    for grad, before, more in zip(grads, start, expected, strict=True):
        assert max_rel(grad.cpu(), before.double() + more.cpu()) <= TOLERANCE[dtype]


def test_rows_of_a_batch_go_to_their_own_adapters(device):
    dy, x, *_ = inputs((90, 37, 21, 5), torch.float32, device)
    a, b = torch.randn(4, 5, 37, device=device), torch.randn(4, 21, 5, device=device)
    groups = [(3, 20, 2), (20, 88, 0), (88, 89, 3)]
    actual = [torch.ones(s, device=device) for s in (a.shape, b.shape, x.shape)]
    expected = [t.clone() for t in actual]
    for op, (da, db, dx) in (
        (grouped_lora_backward, actual),
        (lora.grouped_lora_backward, expected),
    ):
        op(dy, x, Lora(a, b, da, db, SCALING), groups, dx)
    for mine, reference in zip(actual, expected, strict=True):
        torch.testing.assert_close(mine, reference, atol=1e-4, rtol=2e-6)
    assert bool((actual[0][1] == 1).all())
    assert bool((actual[2][:3] == 1).all())
    assert bool((actual[2][89:] == 1).all())


def test_a_part_of_a_merged_projection_and_no_input_gradient(device, max_rel):
    dy, x, a, b = inputs((17, 47, 16, 3), torch.float32, device)
    merged = torch.full((17, 48), torch.nan, device=device)
    merged[:, 16:32] = dy
    da, db = torch.zeros_like(a), torch.zeros_like(b)
    lora_backward(merged[:, 16:32], x, Lora(a, b, da, db, SCALING), None)
    expected = SCALING * (dy @ b).double().T @ x.double()
    assert max_rel(da, expected) <= TOLERANCE[torch.float32]
    assert max_rel(db, SCALING * dy.double().T @ (x @ a.T).double()) <= TOLERANCE[torch.float32]


@pytest.mark.parametrize("rank", [64, 320])
def test_wide_ranks(rank, device, max_rel):
    dy, x, a, b = inputs((5, 19, 11, rank), torch.bfloat16, device)
    da, db = torch.zeros(a.shape, device=device), torch.zeros(b.shape, device=device)
    dx = torch.zeros_like(x)
    lora_backward(dy, x, Lora(a, b, da, db), dx)
    t, u = dy.double() @ b.double(), x.double() @ a.double().T
    assert max_rel(da, t.T @ x.double()) <= TOLERANCE[torch.bfloat16]
    assert max_rel(db, dy.double().T @ u) <= TOLERANCE[torch.bfloat16]
    assert max_rel(dx, t @ a.double()) <= TOLERANCE[torch.bfloat16]
