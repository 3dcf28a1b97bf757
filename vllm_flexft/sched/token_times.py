"""By when the next tokens of the requests in decode are due.

TPOT is a mean over a request's tokens: what its tokens so far saved, the next one may take. A
request that had its first token at t0, and n more since, is to have the next one by
t0 + (n + 1) tpot. A step gives each of them one, so what tells them apart is fixed with the first
token: t0 less tpot times the steps before it. Who has least of that is due first, and stays so.

No clock, no vLLM: times come in as numbers, requests as their ids.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

# Objectives: a request that is later than that is lost, and the steps of others do not pay for it.
MAX_LATE = 8.0


class TokenTimes:
    """`tpot_s`: seconds a token, of every request."""

    def __init__(self, tpot_s: float) -> None:
        self._tpot_s = tpot_s
        self._num_steps = 0
        self._start: dict[str, float] = {}  # request -> t0 - steps before x tpot
        self._earliest: float | None = None  # of them; None: to be looked for

    def __len__(self) -> int:
        return len(self._start)

    def set_objective(self, tpot_s: float) -> None:
        """Requests in decode are held to it from their first token on, but for what they saved, or
        were late, under another one."""
        if tpot_s != self._tpot_s:
            shift = self._num_steps * (self._tpot_s - tpot_s)
            self._start = {name: start + shift for name, start in self._start.items()}
            self._tpot_s, self._earliest = tpot_s, None

    def first_token(self, request: str, now: float, num_in_flight: int = 0) -> None:
        """`num_in_flight`: steps planned already that give it another one."""
        self._start[request] = now - (self._num_steps - num_in_flight) * self._tpot_s
        self._earliest = None

    def ended(self, requests: Iterable[str]) -> None:
        for request in requests:
            if self._start.pop(request, None) is not None:
                self._earliest = None

    def step(self) -> None:
        """One was planned in which requests decode."""
        self._num_steps += 1

    def due(self, now: float) -> float:
        """When the step that is planned next is to end; infinity with nobody in decode."""
        if not self._start:
            return math.inf
        passed = (self._num_steps + 1) * self._tpot_s
        if self._earliest is None:
            self._earliest = min(self._start.values())
        lost = now - MAX_LATE * self._tpot_s - passed
        if self._earliest < lost:
            self._start = {name: max(start, lost) for name, start in self._start.items()}
            self._earliest = lost
        return self._earliest + passed
