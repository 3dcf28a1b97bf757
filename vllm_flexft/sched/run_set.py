"""The jobs in training, and whose turn it is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from vllm_flexft.sched.fair_share import FairShare
from vllm_flexft.sched.run import FinetuneRun
from vllm_flexft.sched.sequence_kv import KVLender


class RunSet:
    def __init__(self) -> None:
        self._runs: dict[str, FinetuneRun] = {}  # oldest first
        self._share = FairShare()

    def __len__(self) -> int:
        return len(self._runs)

    def __iter__(self) -> Iterator[FinetuneRun]:
        return iter(tuple(self._runs.values()))

    def get(self, job_id: str) -> FinetuneRun | None:
        return self._runs.get(job_id)

    def add(self, run: FinetuneRun) -> None:
        self._runs[run.job_id] = run
        self._share.add(run.job_id, run.job.weight)

    def remove(self, run: FinetuneRun) -> None:
        del self._runs[run.job_id]
        self._share.remove(run.job_id)

    @property
    def short_of_blocks(self) -> bool:
        """One waits for blocks: they are not for the others."""
        return any(run.short_of_blocks for run in self._runs.values())

    def in_turn(self) -> list[FinetuneRun]:
        """Who has had least for its weight goes first and may fill the step; the next ones take
        what it leaves."""
        if len(self._runs) == 1:
            return list(self._runs.values())
        return [self._runs[job_id] for job_id in self._share.order(self._runs)]

    def charge(self, work: Mapping[str, float]) -> None:
        """What a step holds, by job: see `FairShare.charge`."""
        if len(self._runs) > 1:
            self._share.charge({job_id: w for job_id, w in work.items() if job_id in self._runs})

    def release_blocks(self, lender: KVLender) -> bool:
        """Inference needs memory: the youngest run with blocks gives those of a micro-batch."""
        return any(run.release_blocks(lender) for run in reversed(self._runs.values()))

    def yield_blocks_to(self, run: FinetuneRun, lender: KVLender) -> bool:
        """A run that began after `run`, and is as short of blocks, gives it a micro-batch's: two
        that hold half of the cache each would wait for each other. One that gets on is left
        alone; it gives its blocks back when its micro-batch is through."""
        for other in reversed(self._runs.values()):
            if other is run:
                return False
            if other.short_of_blocks and other.release_blocks(lender):
                return True
        return False
