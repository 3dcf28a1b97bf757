"""What a step's forward shares with slices of earlier steps that may still run."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import Any

from vllm_flexft.plan import StepPlan
from vllm_flexft.train.stream import lane_of, slot_of


def touched(scheduler_output: Any, plans: Iterable[StepPlan]) -> set[Hashable]:
    """KV blocks that the step hands out, lanes that its chunks are captured in, slots that they
    read.

    A block that slices read is written by others only after the scheduler took it back and handed
    it out again: with the micro-batch's last slices, or when it gave way to a request.
    """
    found: set[Hashable] = set()
    for request in scheduler_output.scheduled_new_reqs:
        found.update(block for group in request.block_ids for block in group)
    for groups in scheduler_output.scheduled_cached_reqs.new_block_ids:
        if groups is not None:
            found.update(block for group in groups for block in group)
    for plan in plans:
        if plan.chunks:
            found.add(slot_of(plan.job_id))
            found.update(lane_of(plan.job_id, chunk.lane) for chunk in plan.chunks)
    return found
