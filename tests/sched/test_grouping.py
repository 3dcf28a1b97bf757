from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from harness.training_data import training_data

from vllm_flexft.data.dataset import TrainingSequence
from vllm_flexft.plan import Windows
from vllm_flexft.sched.grouping import MicroBatchQueue
from vllm_flexft.sched.room import Limits

LIMITS: dict[str, Any] = {
    "windows": Windows(32, 32), "lane_tokens": 100, "num_lanes": 2, "max_rows": 4,
    "lowest_layer": 0, "kv_blocks": 64, "block_size": 16, "activation_policy": "fast",
}  # fmt: skip


def lengths_of(queue: MicroBatchQueue) -> list[list[int]]:
    groups = []
    while queue:
        groups.append([len(s.token_ids) for s in queue.pop()])
    return groups


def test_groups_keep_order_and_fill_a_lane():
    data = training_data([40, 40, 20, 1, 120, 5])
    queue = MicroBatchQueue((data[i] for i in range(6)), Limits(**LIMITS))
    assert lengths_of(queue) == [[40, 40, 20], [1], [120], [5]]


def test_sequences_are_read_only_as_micro_batches_begin():
    """An evaluation may be as large as a data set: no step pays for all of it."""
    data, read = training_data([60] * 100), []

    def rows() -> Iterator[TrainingSequence]:
        for i in range(100):
            read.append(i)
            yield data[i]

    queue = MicroBatchQueue(rows(), Limits(**LIMITS))
    queue.pop()
    assert len(read) <= 3


def test_no_sequences_make_an_empty_queue():
    assert not MicroBatchQueue((), Limits(**LIMITS))
