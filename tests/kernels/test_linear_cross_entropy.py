import pytest
import torch
import torch.nn.functional as F

from flexft_kernels.linear_cross_entropy import linear_cross_entropy

SHAPES = [(1, 3, 17), (3, 17, 47), (47, 64, 123), (123, 47, 257), (257, 17, 1031)]  # (N, D, V)
# Logits are rounded to the activations' dtype, as the served head rounds them: with logits near 4
# that is up to 2⁻⁷ (bf16) and 2⁻¹⁰ (fp16), each the relative error of its probability.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1.5e-2, torch.float16: 2e-3}


def case(shape, dtype, spread=1.0):
    rows, dim, vocab = shape
    h = torch.randn(rows, dim).to(dtype)
    weight = (spread * torch.randn(vocab, dim) / dim**0.5).to(dtype)
    targets = torch.randint(vocab, (rows,))
    return h, weight, targets


def reference(h, weight, targets, scale):
    with torch.enable_grad():
        h64 = h.double().requires_grad_()
        logits = F.linear(h64, weight.double())
        loss = F.cross_entropy(logits, targets, reduction="sum")
        (dh,) = torch.autograd.grad(scale * loss, h64)
    return loss.detach(), (logits.argmax(-1) == targets).sum(), dh


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("row_block", [1, 47, 256])
def test_loss_and_gradient_are_autograd(shape, row_block, dtype, max_rel):
    h, weight, targets = case(shape, dtype)
    loss64, _, dh64 = reference(h, weight, targets, 0.37)
    loss, _, dh = linear_cross_entropy(h, weight, targets, 0.37, row_block=row_block)
    assert loss.dtype == torch.float32
    assert dh.dtype == dtype
    assert max_rel(loss, loss64) <= TOLERANCE[dtype]
    assert max_rel(dh, dh64) <= TOLERANCE[dtype]


def test_hits_are_those_of_argmax():
    h, weight, targets = case((257, 17, 47), torch.float32)
    targets[::2] = (h @ weight.t()).argmax(-1)[::2]
    _, hits, _ = reference(h, weight, targets, 1.0)
    assert hits >= 129
    assert linear_cross_entropy(h, weight, targets, 1.0)[1] == hits


def test_of_tied_logits_the_first_is_the_prediction():
    h, weight = torch.ones(3, 2), torch.tensor([[0.0, 0.0], [1.0, 1.0], [1.0, 1.0]])
    assert linear_cross_entropy(h, weight, torch.tensor([0, 1, 2]), 1.0)[1] == 1


def test_padding_rows_of_the_head_do_not_count(close):
    h, weight, targets = case((17, 16, 47), torch.float32)
    padded = torch.cat((weight, torch.full((17, 16), 9.0)))
    loss64, hits, dh64 = reference(h, weight, targets, 1.0)
    loss, num_correct, dh = linear_cross_entropy(h, padded, targets, 1.0, vocab_size=47)
    assert num_correct == hits
    close(loss, loss64, torch.float32)
    close(dh, dh64, torch.float32)


def test_evaluation_gives_the_same_loss_and_hits_without_a_gradient():
    h, weight, targets = case((123, 16, 47), torch.bfloat16)
    loss, num_correct, _ = linear_cross_entropy(h, weight, targets, 1.0)
    eval_loss, eval_correct, dh = linear_cross_entropy(h, weight, targets, 1.0, need_grad=False)
    assert dh is None
    assert (eval_loss, eval_correct) == (loss, num_correct)


def test_a_learnt_token_keeps_its_small_gradient_in_bf16(max_rel):
    """Probability 0.999 rounds to 1 in bf16; the target's gradient must not become 0."""
    h = torch.tensor([[1.0, 0.0]], dtype=torch.bfloat16)
    weight = torch.tensor([[7.0, 0.0], [0.0, 1.0]], dtype=torch.bfloat16)
    targets = torch.tensor([0])
    _, _, dh64 = reference(h, weight, targets, 1.0)
    assert max_rel(linear_cross_entropy(h, weight, targets, 1.0)[2], dh64) < 8e-3


def test_losses_beyond_the_range_of_exp_stay_finite(close):
    h, weight, targets = case((17, 16, 47), torch.float32, spread=300.0)
    loss64, _, _ = reference(h, weight, targets, 1.0)
    assert loss64 > 100 * 17
    loss, _, dh = linear_cross_entropy(h, weight, targets, 1.0)
    close(loss, loss64, torch.float32)
    assert torch.isfinite(dh).all()


def test_a_workspace_may_be_larger_and_dirty():
    h, weight, targets = case((123, 16, 47), torch.float32)
    workspace = torch.full((64, 47), torch.nan)
    with_workspace = linear_cross_entropy(
        h, weight, targets, 1.0, row_block=50, workspace=workspace
    )
    without = linear_cross_entropy(h, weight, targets, 1.0, row_block=50)
    for a, b in zip(with_workspace, without, strict=True):
        assert torch.equal(a, b)


def test_no_rows_give_no_loss():
    h, weight, targets = case((0, 16, 47), torch.float32)
    loss, num_correct, dh = linear_cross_entropy(h, weight, targets, 1.0)
    assert (loss, num_correct, dh.shape) == (0, 0, (0, 16))
