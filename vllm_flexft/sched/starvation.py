"""Says why a job makes no progress, once in a while: silence would look like a hang."""

from __future__ import annotations

import logging

logger = logging.getLogger("vllm.flexft")

PATIENCE_S = 30.0  # without progress
REPEAT_S = 300.0  # while it lasts


class StarvationLog:
    def __init__(self) -> None:
        self._since: float | None = None  # when work was first postponed, with none done after
        self._next_line = 0.0

    def progress(self, now: float) -> None:
        """Work was planned, or there is none to do."""
        if self._since is not None and self._next_line > self._since + PATIENCE_S:
            logger.info("finetuning goes on after %.0f s", now - self._since)
        self._since = None

    def postponed(self, now: float, job: str, reason: str) -> None:
        if self._since is None:
            self._since, self._next_line = now, now + PATIENCE_S
        if now < self._next_line:
            return
        self._next_line = now + REPEAT_S
        logger.warning(
            "[%s] no finetuning for %.0f s: %s. Requests come first; a higher slo.tpot_ms leaves "
            "more of each step to it, and the server option min_share a part in any case",
            job,
            now - self._since,
            reason,
        )
