"""A micro-batch as the scheduler sees it: how far forward and backward have come."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from vllm_flexft.data.dataset import TrainingSequence
from vllm_flexft.graph.grid import BackwardGrid
from vllm_flexft.plan import MicroBatch
from vllm_flexft.sched.sequence_kv import KV_ID_PREFIX, KVLender, SequenceKV


@dataclass(slots=True)
class ScheduledSequence:
    row: int  # first row in the lane
    token_ids: list[int]
    kv: SequenceKV

    @property
    def remaining(self) -> int:
        return len(self.token_ids) - self.kv.num_tokens


class ScheduledMicroBatch:
    """Owns its sequences' KV blocks from the first chunk until its last slice has run."""

    def __init__(
        self,
        batch_id: int,
        sequences: list[TrainingSequence],
        *,
        step: int,
        lane: int,
        loss_scale: float,
        train: bool,
        kv_prefix: str,  # of the names of its blocks, unlike any other job's
        grid_of: tuple[int, int, int],  # window, num_layers, lowest_layer
    ) -> None:
        self.step, self.lane = step, lane
        lengths = [len(s.token_ids) for s in sequences]
        offsets = tuple(int(x) for x in np.concatenate([[0], np.cumsum(lengths)]))
        self.spec = MicroBatch(
            id=batch_id,
            lane=lane,
            token_ids=np.concatenate([s.token_ids for s in sequences]),
            supervised=np.concatenate([s.supervised for s in sequences]),
            offsets=offsets,
            loss_scale=loss_scale,
            train=train,
        )
        window, num_layers, lowest = grid_of
        self.grid = BackwardGrid(
            num_tokens=offsets[-1],
            window=window,
            num_layers=num_layers,
            lowest_layer=lowest if train else num_layers,
        )
        self.sequences = [
            ScheduledSequence(
                row=offset,
                token_ids=s.token_ids.tolist(),
                kv=SequenceKV(f"{KV_ID_PREFIX}{kv_prefix}{batch_id}-{i}", s.token_ids.tolist()),
            )
            for i, (offset, s) in enumerate(zip(offsets, sequences, strict=False))
        ]
        self.slices_done = 0
        self.begun = False  # the worker knows it
        self.located = False  # the worker knows where its keys and values lie

    @property
    def forwarded(self) -> bool:
        return all(s.remaining == 0 for s in self.sequences)

    @property
    def finished(self) -> bool:
        return self.slices_done == self.grid.num_slices

    def unforwarded(self) -> Iterator[ScheduledSequence]:
        return (s for s in self.sequences if s.remaining)

    def block_ids(self, lender: KVLender) -> tuple[tuple[list[int], ...], ...]:
        return tuple(lender.block_ids(s.kv) for s in self.sequences)

    def release(self, lender: KVLender) -> bool:
        """Give all blocks back; the forward has to run again. True when there were any.

        Slices that ran stay done: the worker keeps their gradients, and running the forward again
        with the same weights restores the keys and values that later slices read.
        """
        held = any(s.kv.num_tokens for s in self.sequences)
        for sequence in self.sequences:
            lender.free(sequence.kv)
        self.located = False
        return held
