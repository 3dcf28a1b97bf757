"""The gradient comparison notices every one of these errors in the backward.

Each mutation is put into the running code. The same comparison as in test_gradients.py, which
passes without it, then has to fail, and not by a hair.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from harness.gradients import Case, Row
from torch import Tensor

TOLERANCE = 1e-5
CLEAR = 10 * TOLERANCE  # what a mutation has to reach: far above rounding

# One micro-batch of 35, 178 and 153 tokens (by Llama's tokenizer) in six windows.
CASE = Case((Row(0, 60, 60), Row(300, 260, 300), Row(3000, 200, 300)), alpha=12, window=61)
SEVERAL_MICRO_BATCHES = dataclasses.replace(CASE, lane_tokens=1)
RECOMPUTING = dataclasses.replace(CASE, recomputed=("gate_up", "qkv", "attention", "residual_mid"))

Patch = pytest.MonkeyPatch
Mutation = Callable[[Patch], None]


def replace_slices(patch: Patch, change: Callable[[Any], Any]) -> None:
    from vllm_flexft.graph.grid import BackwardGrid

    original = BackwardGrid.slice
    patch.setattr(BackwardGrid, "slice", lambda self, index: change(original(self, index)))


def window_starts_one_late(patch: Patch) -> None:
    replace_slices(
        patch,
        lambda part: dataclasses.replace(part, start=part.start + 1) if part.start == 122 else part,
    )


def window_stops_one_late(patch: Patch) -> None:
    replace_slices(
        patch,
        lambda part: dataclasses.replace(part, stop=part.stop + 1) if part.stop == 122 else part,
    )


def replace_attention(patch: Patch, replacement: Callable[..., Tensor]) -> None:
    from vllm_flexft.train import layer

    original = layer.attention_backward_varlen
    calls = iter(range(10_000))

    def attention(*args: Any, **kwargs: Any) -> Tensor:
        return replacement(original, next(calls), *args, **kwargs)

    patch.setattr(layer, "attention_backward_varlen", attention)


def without_contribution(patch: Patch, which: str, rows: slice) -> None:
    """The second window to run in the uppermost layer adds nothing to those rows of dK or dV."""

    def attention(original: Any, call: int, *args: Any, **kwargs: Any) -> Tensor:
        sums = getattr(args[2], which)
        before = sums.clone()
        dq = original(*args, **kwargs)
        if call == 1:
            sums[rows] = before[rows]
        return dq

    replace_attention(patch, attention)


def dk_of_a_window_dropped(patch: Patch) -> None:
    without_contribution(patch, "dk_TKE", slice(None))


def dk_of_a_window_to_one_key_dropped(patch: Patch) -> None:
    without_contribution(patch, "dk_TKE", slice(243, 244))


def dv_of_a_window_dropped(patch: Patch) -> None:
    without_contribution(patch, "dv_TKE", slice(None))


def kv_gradients_kept_from_the_layer_above(patch: Patch) -> None:
    replace_slices(patch, lambda part: dataclasses.replace(part, first_of_stage=False))
    from vllm_flexft.train.backward import MicroBatchBackward

    load = MicroBatchBackward._load_kv
    run = MicroBatchBackward._run_slice

    def run_slice(self: Any, part: Any) -> None:
        if part.stop == self.batch.num_tokens:
            self._kv = None  # still the right keys and values
        run(self, part)

    patch.setattr(
        MicroBatchBackward, "_load_kv", lambda self, geometry, fresh: load(self, geometry, False)
    )
    patch.setattr(MicroBatchBackward, "_run_slice", run_slice)


def after_construction(patch: Patch, change: Callable[[Any], None]) -> None:
    from vllm_flexft.train.backward import MicroBatchBackward

    construct = MicroBatchBackward.__init__

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        construct(self, *args, **kwargs)
        change(self)

    patch.setattr(MicroBatchBackward, "__init__", init)


def rope_positions_one_late(patch: Patch) -> None:
    after_construction(patch, lambda backward: backward._positions_T.add_(1))


def rope_positions_run_through_the_micro_batch(patch: Patch) -> None:
    after_construction(
        patch,
        lambda backward: backward._positions_T.copy_(torch.arange(backward.batch.num_tokens)),
    )


def loss_rows_one_early(patch: Patch) -> None:
    after_construction(patch, lambda backward: backward._loss_rows_N.sub_(1).clamp_(min=0))


def replace_segments(patch: Patch, change: Callable[[int, int, int, int], tuple]) -> None:
    from vllm_flexft.train.backward import MicroBatchBackward

    original = MicroBatchBackward._segments
    patch.setattr(
        MicroBatchBackward,
        "_segments",
        lambda self, part: [change(*segment) for segment in original(self, part)],
    )


def query_start_one_early(patch: Patch) -> None:
    replace_segments(patch, lambda row, stop, key, q: (row, stop, key, max(q - 1, 0)))


def key_start_one_early(patch: Patch) -> None:
    replace_segments(patch, lambda row, stop, key, q: (row, stop, max(key - 1, 0), q))


def sequences_not_kept_apart(patch: Patch) -> None:
    """A query attends everything before it in the micro-batch."""
    replace_segments(patch, lambda row, stop, key, q: (row, stop, 0, key + q))


def replace_in_layer(patch: Patch, name: str, replacement: Any) -> None:
    from vllm_flexft.train import layer

    patch.setattr(layer, name, replacement)


def skip_connection_dropped(patch: Patch) -> None:
    from vllm_flexft.train.layer import _through_norm

    replace_in_layer(
        patch,
        "_through_norm",
        lambda norm, dh, x, skip: _through_norm(norm, dh, x, torch.zeros_like(skip)),
    )


def rope_not_undone(patch: Patch) -> None:
    replace_in_layer(patch, "rope_backward", lambda dy, cos_sin: dy)


def adapters_left_out_of_dx(patch: Patch) -> None:
    from vllm_flexft.train.layer import lora_backward

    replace_in_layer(patch, "lora_backward", lambda *args: lora_backward(*args[:-1], None))


def adapters_left_out_of_recomputation(patch: Patch) -> None:
    from vllm_flexft.train.window import LayerForward

    patch.setattr(LayerForward, "linear", lambda _self, linear, x: linear.apply(x))


def scaling_of_b_missing(patch: Patch) -> None:
    from vllm_flexft.train.adapter import TrainableAdapter

    patch.setattr(TrainableAdapter, "finish_gradients", lambda self: None)


def scaling_of_the_slot_missing(patch: Patch) -> None:
    from vllm_flexft.train.adapter import TrainableAdapter

    push = TrainableAdapter.push

    def push_unscaled(self: Any) -> None:
        self.scaling, scaling = 1.0, self.scaling
        push(self)
        self.scaling = scaling

    patch.setattr(TrainableAdapter, "push", push_unscaled)


def captured_one_row_low(patch: Patch) -> None:
    from vllm_flexft.train.activations import ActivationStore, LaneRows

    located = ActivationStore.rows

    def one_low(self: Any, lane: int, ranges: list[tuple[int, int, int]]) -> LaneRows:
        low = []
        for start, stop, to in ranges:
            # The first row is written too: what an unwritten one holds is chance.
            low += [(start, start + 1, to), (start, stop - 1, to + 1)]
        return located(self, lane, low)

    patch.setattr(ActivationStore, "rows", one_low)


def kv_blocks_swapped(patch: Patch) -> None:
    from vllm_flexft.train.backward import MicroBatchBackward

    locate = MicroBatchBackward.locate_kv

    def locate_swapped(self: Any, block_ids: Any) -> None:
        swapped = tuple(tuple(ids[::-1] for ids in groups) for groups in block_ids)
        locate(self, swapped)

    patch.setattr(MicroBatchBackward, "locate_kv", locate_swapped)


def targets_counted_by_micro_batch(patch: Patch) -> None:
    from vllm_flexft.sched import run

    create = run.ScheduledMicroBatch

    def scaled(batch_id: int, sequences: Any, **kwargs: Any) -> Any:
        targets = sum(sequence.num_targets for sequence in sequences)
        return create(batch_id, sequences, **{**kwargs, "loss_scale": 1 / targets})

    patch.setattr(run, "ScheduledMicroBatch", scaled)


MUTATIONS: list[tuple[str, Mutation, Case]] = [
    ("llama", window_starts_one_late, CASE),
    ("llama", window_stops_one_late, CASE),
    ("llama", dk_of_a_window_dropped, CASE),
    ("llama", dk_of_a_window_to_one_key_dropped, CASE),
    ("llama", dv_of_a_window_dropped, CASE),
    ("llama", kv_gradients_kept_from_the_layer_above, CASE),
    ("llama", rope_positions_one_late, CASE),
    ("llama", rope_positions_run_through_the_micro_batch, CASE),
    ("llama", rope_not_undone, CASE),
    ("llama", loss_rows_one_early, CASE),
    ("llama", query_start_one_early, CASE),
    ("llama", key_start_one_early, CASE),
    ("llama", sequences_not_kept_apart, CASE),
    ("llama", skip_connection_dropped, CASE),
    ("llama", adapters_left_out_of_dx, CASE),
    ("llama", adapters_left_out_of_recomputation, RECOMPUTING),
    ("llama", scaling_of_b_missing, CASE),
    ("llama", scaling_of_the_slot_missing, CASE),
    ("llama", captured_one_row_low, CASE),
    ("llama", kv_blocks_swapped, CASE),
    ("llama", targets_counted_by_micro_batch, SEVERAL_MICRO_BATCHES),
]


@pytest.mark.parametrize("case", [CASE, SEVERAL_MICRO_BATCHES, RECOMPUTING])
def test_comparison_passes_without_a_mutation(case, bench):
    assert bench("llama").measure(case).worst() <= TOLERANCE


@pytest.mark.parametrize(
    ("family", "mutation", "case"), [pytest.param(*m, id=m[1].__name__) for m in MUTATIONS]
)
def test_comparison_fails_for(family, mutation, case, bench, worst, monkeypatch):
    bench = bench(family)
    mutation(monkeypatch)
    error = bench.measure(case).worst()
    worst.see(mutation.__name__.replace("_", " "), error)
    assert error > CLEAR


def test_comparison_fails_for_a_sliding_window_off_by_one(bench, worst, monkeypatch):
    from vllm_flexft.train import layer

    original = layer.attention_backward_varlen

    def attention(*args: Any, sliding_window: int, **kwargs: Any) -> Tensor:
        return original(*args, sliding_window=sliding_window + 1, **kwargs)

    bench = bench("mistral")
    monkeypatch.setattr(layer, "attention_backward_varlen", attention)
    error = bench.measure(CASE).worst()
    worst.see("sliding window off by one", error)
    assert error > CLEAR


def test_comparison_fails_for_a_missing_query_key_norm(bench, worst, monkeypatch):
    from vllm_flexft.train import layer

    original = layer.rms_norm_backward

    def rms_norm_backward(dy: Tensor, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return dy if x.ndim == 3 else original(dy, x, *args, **kwargs)

    bench = bench("qwen3")
    monkeypatch.setattr(layer, "rms_norm_backward", rms_norm_backward)
    error = bench.measure(CASE).worst()
    worst.see("query-key norm left out", error)
    assert error > CLEAR
