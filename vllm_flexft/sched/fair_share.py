"""Which job in training goes first: the one that has had least for its weight.

Start-time fair queueing (Goyal, Vin, Cheng, SIGCOMM '96) with steps for packets: a job's virtual
time grows by the work it was given over its weight, and a job that could not use its turn does not
save it up.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence


class FairShare:
    def __init__(self) -> None:
        self._weight: dict[str, float] = {}
        self._virtual_time: dict[str, float] = {}

    def add(self, job_id: str, weight: float) -> None:
        """A new job starts level with the one that has had least."""
        self._virtual_time[job_id] = min(self._virtual_time.values(), default=0.0)
        self._weight[job_id] = weight

    def remove(self, job_id: str) -> None:
        del self._weight[job_id], self._virtual_time[job_id]

    def order(self, job_ids: Iterable[str]) -> Sequence[str]:
        """Least served first; the older of two that are level."""
        return sorted(job_ids, key=self._virtual_time.__getitem__)

    def charge(self, seconds: Mapping[str, float]) -> None:
        """A step's work by job, of those that had a turn. One that had no use for it (0) is
        brought level with the least served of the others; leave out one that was kept from it."""
        for job_id, work in seconds.items():
            self._virtual_time[job_id] += work / self._weight[job_id]
        used = [self._virtual_time[job_id] for job_id, work in seconds.items() if work > 0]
        if used:
            level = min(used)
            for job_id, work in seconds.items():
                if work == 0:
                    self._virtual_time[job_id] = max(self._virtual_time[job_id], level)
