"""The trainer on Triton's kernels from end to end: rows captured by index, K and V read in place.

Float64 autograd of the same decoder is what it is compared with.
"""

import itertools

import numpy as np
import pytest
import torch
from harness.backward import trainer_of
from harness.small_decoder import BLOCK, SmallDecoder, forward

from flexft_kernels import ops
from vllm_flexft.plan import BackwardSlices, MicroBatch, StepPlan
from vllm_flexft.train.activations import LaneRows

OFFSETS = (0, 13, 16, 37)
TOKENS = OFFSETS[-1]
WINDOW = 16


@pytest.fixture(autouse=True)
def _triton(monkeypatch):
    """All ops by their kernels, in fp32 too: what is wrong then shows in the fifth digit."""
    pytest.importorskip("triton")
    monkeypatch.setattr(ops, "_has_kernel", lambda first, half_only: True)


def capture(trainer, kept):
    """Every row of every tensor, from a batch in another order with rows of others between."""
    row = torch.randperm(TOKENS + 5)[:TOKENS]  # of token i in the batch
    device = trainer.model.device
    rows = LaneRows(0, (), (row.to(device), torch.arange(TOKENS).to(device)))
    for (layer, name), tensor in kept.items():
        if trainer.store.holds(layer, name):
            batch = torch.full((TOKENS + 5, tensor.shape[1]), torch.nan, device=device)
            batch[row] = tensor.float()
            trainer.store.write(rows, layer, name, batch)


def page(model, keys):
    """Keys and values into blocks of the cache in any order; returns those of each sequence."""
    free = torch.randperm(len(model.caches[0])).tolist()
    blocks = [
        [free.pop() for _ in range(-(-(stop - start) // BLOCK))]
        for start, stop in itertools.pairwise(OFFSETS)
    ]
    for cache, (k, v) in zip(model.caches, keys, strict=True):
        for sequence, (start, stop) in zip(blocks, itertools.pairwise(OFFSETS), strict=True):
            for i in range(stop - start):
                at = cache[sequence[i // BLOCK], :, i % BLOCK]
                at.copy_(torch.cat((k[start + i], v[start + i]), dim=-1))
    return blocks


def adapters(trainer):
    """Leaves in float64, of the slot's values: what the trainer's gradients are taken of."""
    leaves, by_linear = {}, {}
    for index, packed in trainer.adapter.linears.items():
        for name, parts in packed.items():
            for part in parts:
                a, b = (x.double().requires_grad_() for x in (part.slot.a, part.slot.b))
                leaves[part.name] = (part, a, b)
                by_linear.setdefault((index, name), []).append((part.part, a, b))
    return leaves, by_linear


@pytest.mark.parametrize(("policy", "sliding_window"), [("fast", None), ("minimal", 7)])
def test_gradients_are_float64_autograds(policy, sliding_window, device, max_rel):
    model = SmallDecoder(device, sliding_window, num_blocks=14)
    trainer = trainer_of(model.served, TOKENS, WINDOW, policy)
    assert trainer.error is None
    x = torch.randn(TOKENS, model.served.hidden_size).to(device)
    supervised = np.random.default_rng(0).random(TOKENS) < 0.7
    supervised[list(OFFSETS[:-1])] = False  # nothing predicts a first token
    token_ids = np.random.default_rng(1).integers(37, size=TOKENS, dtype=np.int32)
    targets = torch.full((TOKENS,), -100)
    targets[:-1] = torch.where(
        torch.from_numpy(supervised[1:]), torch.from_numpy(token_ids[1:]).long(), -100
    )
    leaves, by_linear = adapters(trainer)
    with torch.enable_grad():
        done = forward(model, by_linear, x, targets, OFFSETS)
        flat = [leaf for _, a, b in leaves.values() for leaf in (a, b)]
        grads = iter(torch.autograd.grad(done.loss, flat))
    kept = {key: tensor.detach() for key, tensor in done.kept.items()}
    trainer.store._arena.fill_(torch.nan)
    capture(trainer, kept)
    blocks = page(model, [(k.detach(), v.detach()) for k, v in done.keys])

    batch = MicroBatch(1, 0, token_ids, supervised, OFFSETS, loss_scale=1.0, train=True)
    trainer.begin((batch,))
    micro_batch = trainer._micro_batches[1]
    slices = BackwardSlices(1, micro_batch.grid.num_slices, tuple((b,) for b in blocks))
    (result,) = trainer.step(StepPlan("job", backward=(slices,)))
    assert result.error is None
    assert abs(float(micro_batch.loss_sum) - float(done.loss)) < 1e-4
    for part, _, _ in leaves.values():
        assert max_rel(part.grad_a, next(grads)) < 2e-5, part.name
        assert max_rel(part.grad_b, next(grads)) < 2e-5, part.name
