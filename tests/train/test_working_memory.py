"""What the backward holds beside the arena: bounded by the window, whatever the sequence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from harness.backward import backward, trainer_of, with_random_keys

from benchmarks.live_bytes import LiveBytes
from vllm_flexft.train.backward import MicroBatchBackward
from vllm_flexft.train.model import ServedModel

WINDOW = 256
VOCAB, HEADS = 2048, 4  # of the test model
# Bytes a key that a slice may hold: scores and their gradient for the 96 query rows that attention
# takes at a time, of both KV heads (1,536), keys and values in fp32 and read from the cache, masks.
# The scores of a whole window would be 2 x 4 x WINDOW x HEADS = 8,192.
PER_KEY = 3072


def peaks(
    model: ServedModel, tokens: int, window: int, policy: Any, monkeypatch: pytest.MonkeyPatch
) -> tuple[int, int]:
    """Most bytes that live during a slice beyond those before it; and those left at the end."""
    made = trainer_of(model, tokens, window, policy)
    tracker, peak = LiveBytes(), 0
    run_slice: Callable[..., None] = MicroBatchBackward._run_slice

    def watched(self: MicroBatchBackward, part: Any) -> None:
        nonlocal peak
        before = tracker.peak = tracker.total
        run_slice(self, part)
        peak = max(peak, tracker.peak - before)

    with monkeypatch.context() as patch, tracker:
        patch.setattr(MicroBatchBackward, "_run_slice", watched)
        before = tracker.total
        backward(made, tokens)
        return peak, tracker.total - before


@pytest.fixture(scope="module")
def model(bench: Any) -> ServedModel:
    return with_random_keys(bench("llama").served_model())


@pytest.mark.parametrize("policy", ["fast", "minimal"])
def test_a_slice_needs_no_memory_that_grows_with_the_sequence_but_a_few_rows_of_scores(
    model, policy, monkeypatch
):
    """No S x S and no T x V: twice the tokens add rows of scores."""
    short, long = 512, 1024
    small, _ = peaks(model, short, WINDOW, policy, monkeypatch)
    large, left = peaks(model, long, WINDOW, policy, monkeypatch)
    assert large - small <= (long - short) * PER_KEY
    assert large < min(4 * long * long * HEADS, 4 * long * VOCAB)
    assert left <= 4096  # a loss and a count


def test_the_loss_makes_no_logits_of_its_own(model, monkeypatch):
    """They lie in the working buffers; what a slice makes itself are eight rows in fp32."""
    made, tracker = trainer_of(model, 256, WINDOW), LiveBytes()
    peak = []
    loss: Callable[..., None] = MicroBatchBackward._loss

    def watched(self: MicroBatchBackward, part: Any) -> None:
        before = tracker.peak = tracker.total
        loss(self, part)
        peak.append(tracker.peak - before)

    monkeypatch.setattr(MicroBatchBackward, "_loss", watched)
    with tracker:
        backward(made, 256)
    rows = WINDOW // 2  # of a window of the loss
    assert made.working.logits.shape == (rows, VOCAB)
    assert len(peak) == 2
    assert max(peak) < 4 * rows * VOCAB / 2


def test_the_check_notices_a_backward_in_one_window(model, monkeypatch):
    small, _ = peaks(model, 512, 512, "fast", monkeypatch)
    large, _ = peaks(model, 1024, 1024, "fast", monkeypatch)
    assert large - small > (1024 - 512) * PER_KEY
