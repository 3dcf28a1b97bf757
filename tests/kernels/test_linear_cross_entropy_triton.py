import pytest
import torch
import torch.nn.functional as F

from flexft_kernels import linear_cross_entropy_triton as module
from flexft_kernels.linear_cross_entropy_triton import linear_cross_entropy

SHAPES = [(1, 3, 17), (9, 17, 47), (5, 47, 257), (3, 8, 1031)]  # (N, D, V)
# As of the plain op: logits near 4 are rounded to the activations' dtype.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1.5e-2, torch.float16: 2e-3}


def case(shape, dtype, device, spread=1.0):
    rows, dim, vocab = shape
    h = torch.randn(rows, dim).to(device, dtype)
    weight = (spread * torch.randn(vocab, dim) / dim**0.5).to(device, dtype)
    return h, weight, torch.randint(vocab, (rows,)).to(device)


def reference(h, weight, targets, scale):
    with torch.enable_grad():
        h64 = h.double().requires_grad_()
        loss = F.cross_entropy(F.linear(h64, weight.double()), targets, reduction="sum")
        (dh,) = torch.autograd.grad(scale * loss, h64)
    return loss.detach(), dh


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_loss_and_gradient_are_autograd(shape, dtype, device, max_rel, monkeypatch):
    monkeypatch.setattr(module, "_BLOCK", 128)  # the wide vocabularies span blocks
    h, weight, targets = case(shape, dtype, device)
    loss64, dh64 = reference(h, weight, targets, 0.37)
    loss, _, dh = linear_cross_entropy(h, weight, targets, 0.37, row_block=4)
    assert dh.dtype == dtype
    assert max_rel(loss, loss64) <= TOLERANCE[dtype]
    assert max_rel(dh, dh64) <= TOLERANCE[dtype]


def test_hits_are_those_of_argmax_and_padding_does_not_count(device):
    h, weight, targets = case((23, 17, 47), torch.float32, device)
    targets[::2] = (h @ weight.t()).argmax(-1)[::2]
    hits = int(((h @ weight.t()).argmax(-1) == targets).sum())
    padded = torch.cat((weight, torch.full((17, 17), 9.0, device=device)))
    assert hits >= 12
    assert linear_cross_entropy(h, padded, targets, 1.0, vocab_size=47)[1] == hits


def test_of_tied_logits_the_first_is_the_prediction(device):
    h, weight = torch.ones(3, 2), torch.tensor([[0.0, 0.0], [1.0, 1.0], [1.0, 1.0]])
    arguments = (h.to(device), weight.to(device), torch.tensor([0, 1, 2]).to(device), 1.0)
    assert linear_cross_entropy(*arguments)[1] == 1


def test_a_learnt_token_keeps_its_small_gradient_in_bf16(device, max_rel):
    """Probability 0.999 rounds to 1 in bf16; the target's gradient must not become 0."""
    h = torch.tensor([[1.0, 0.0]], dtype=torch.bfloat16, device=device)
    weight = torch.tensor([[7.0, 0.0], [0.0, 1.0]], dtype=torch.bfloat16, device=device)
    targets = torch.tensor([0], device=device)
    _, dh64 = reference(h, weight, targets, 1.0)
    assert max_rel(linear_cross_entropy(h, weight, targets, 1.0)[2], dh64) < 8e-3


def test_losses_beyond_the_range_of_exp_stay_finite(device, close):
    h, weight, targets = case((7, 16, 47), torch.float32, device, spread=300.0)
    loss64, _ = reference(h, weight, targets, 1.0)
    assert loss64 > 100 * 7
    loss, _, dh = linear_cross_entropy(h, weight, targets, 1.0)
    close(loss, loss64, torch.float32)
    assert bool(torch.isfinite(dh).all())
