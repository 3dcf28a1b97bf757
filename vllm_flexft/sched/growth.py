"""How fast requests become more: whether a burst is under way, before any of them has to wait.

Under overload every second of finetuning in its first seconds is paid back by all requests after
it. The rise is seen long before the queue.
"""

from __future__ import annotations

import math

MEMORY_S = 1.0  # of the mean that the present number is held against
TREND = 1.5  # requests above it: one more, or two at times, are no burst


class Growth:
    """No clock, no vLLM: time comes in as a number."""

    def __init__(self) -> None:
        self._mean = 0.0
        self._at = -math.inf
        self.rate = 0.0  # what `update` last told

    def update(self, now: float, requests: int) -> None:
        """`requests`: running and waiting. `rate` becomes by how many a second they have grown,
        beyond `TREND`. After a pause nothing is known: what is there then, has been there."""
        passed = now - self._at
        self._at = now
        self._mean += (requests - self._mean) * (1.0 - math.exp(-passed / MEMORY_S))
        self.rate = max(0.0, (requests - self._mean - TREND) / MEMORY_S)
