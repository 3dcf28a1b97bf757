"""Which sequences of a phase form a micro-batch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from vllm_flexft.data.dataset import TrainingSequence
from vllm_flexft.sched.room import Limits


class MicroBatchQueue:
    """Consecutive sequences, as many as fit a lane and the micro-batch's part of the KV cache; a
    sequence that is too long for that part goes alone.

    Groups are formed one at a time: an evaluation may be as large as a data set.
    """

    def __init__(self, sequences: Iterable[TrainingSequence], limits: Limits) -> None:
        self._groups = _groups(sequences, limits)
        self._next = next(self._groups, None)

    def __bool__(self) -> bool:
        return self._next is not None

    def pop(self) -> list[TrainingSequence]:
        group = self._next
        assert group is not None, "no micro-batch is left"
        self._next = next(self._groups, None)
        return group


def _groups(
    sequences: Iterable[TrainingSequence], limits: Limits
) -> Iterator[list[TrainingSequence]]:
    group: list[TrainingSequence] = []
    room, blocks = limits.lane_tokens, limits.kv_blocks
    for sequence in sequences:
        length = len(sequence.token_ids)
        need = -(-length // limits.block_size)
        if group and (length > room or need > blocks or len(group) >= limits.max_rows):
            yield group
            group = []
            room, blocks = limits.lane_tokens, limits.kv_blocks
        group.append(sequence)
        room -= length
        blocks -= need
    if group:
        yield group
