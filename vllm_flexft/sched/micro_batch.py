"""A micro-batch as the scheduler sees it: how far forward and backward have come."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vllm_flexft.data.dataset import TrainingSequence
from vllm_flexft.graph.grid import BackwardGrid
from vllm_flexft.plan import MicroBatch, Windows
from vllm_flexft.sched.sequence_kv import KV_ID_PREFIX, KVLender, SequenceKV
from vllm_flexft.sched.slice_amounts import SliceAmounts


@dataclass(slots=True)
class ScheduledSequence:
    row: int  # first row in the lane
    num_tokens: int
    kv: SequenceKV

    @property
    def remaining(self) -> int:
        return self.num_tokens - self.kv.num_tokens


class ScheduledMicroBatch:
    """Owns its sequences' KV blocks, from just before their chunks until its last slice has run.

    It is made ahead of the step in which it begins; `enter` then gives it its lane.
    """

    spec: MicroBatch  # what the worker is told, from `enter` on

    def __init__(
        self,
        batch_id: int,
        sequences: list[TrainingSequence],
        *,
        loss_scale: float,
        train: bool,
        kv_prefix: str,  # of the names of its blocks, unlike any other job's
        grid_of: tuple[Windows, int, int],  # num_layers, lowest_layer
    ) -> None:
        self.id = batch_id
        lengths = [len(s.token_ids) for s in sequences]
        offsets = (0, *itertools.accumulate(lengths))
        # The last one is read as the token after a chunk that ends the last sequence.
        self._token_ids = np.zeros(offsets[-1] + 1, dtype=np.int32)
        np.concatenate([s.token_ids for s in sequences], out=self._token_ids[:-1])
        self._supervised = np.concatenate([s.supervised for s in sequences])
        self._offsets, self._loss_scale, self._train = offsets, loss_scale, train
        windows, num_layers, lowest = grid_of
        self.grid = BackwardGrid(
            num_tokens=offsets[-1],
            windows=windows,
            num_layers=num_layers,
            lowest_layer=lowest if train else num_layers,
        )
        self.amounts = SliceAmounts(self.grid, self._supervised, offsets)
        self.sequences = [
            ScheduledSequence(
                row=offset,
                num_tokens=length,
                kv=SequenceKV(f"{KV_ID_PREFIX}{kv_prefix}{batch_id}-{i}", length),
            )
            for i, (offset, length) in enumerate(zip(offsets, lengths, strict=False))
        ]
        self._num_forwarded = 0  # sequences at the front that are through
        self.slices_done = 0
        self.begun = False  # the worker knows it
        self.located = False  # the worker knows where its keys and values lie

    def enter(self, lane: int) -> None:
        self.spec = MicroBatch(
            id=self.id,
            lane=lane,
            token_ids=self._token_ids[:-1],
            supervised=self._supervised,
            offsets=self._offsets,
            loss_scale=self._loss_scale,
            train=self._train,
        )

    @property
    def lane(self) -> int:
        return self.spec.lane

    @property
    def forwarded(self) -> bool:
        while self._num_forwarded < len(self.sequences):
            if self.sequences[self._num_forwarded].remaining:
                return False
            self._num_forwarded += 1
        return True

    @property
    def finished(self) -> bool:
        return self.slices_done == self.grid.num_slices

    def unforwarded(self) -> Iterator[ScheduledSequence]:
        return (s for s in self.sequences[self._num_forwarded :] if s.remaining)

    def shortened(self) -> None:
        """Some of its sequences have fewer tokens forwarded than before."""
        self._num_forwarded = 0

    def prompt(self, sequence: ScheduledSequence, stop: int) -> npt.NDArray[np.int32]:
        """The sequence's first `stop` tokens and, unread, one more: vLLM then takes a chunk up to
        `stop` for a part of a longer prompt and samples nothing for it."""
        return self._token_ids[sequence.row : sequence.row + stop + 1]

    @property
    def block_ids(self) -> tuple[tuple[list[int], ...], ...]:
        return tuple(s.kv.block_ids for s in self.sequences)

    def release_unused(self, lender: KVLender) -> bool:
        """Give back the blocks of sequences that have not begun. True when there were any."""
        unused = [s.kv for s in self.sequences if s.kv.num_blocks and not s.kv.num_tokens]
        for kv in unused:
            lender.free(kv)
        return bool(unused)

    def release(self, lender: KVLender) -> bool:
        """Give all blocks back; the forward has to run again. True when there were any.

        Slices that ran stay done: the worker keeps their gradients, and running the forward again
        with the same weights restores the keys and values that later slices read.
        """
        held = any(s.kv.num_blocks for s in self.sequences)
        for sequence in self.sequences:
            lender.free(sequence.kv)
        self.located = False
        self.shortened()
        return held
