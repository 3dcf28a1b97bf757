"""Removes surplus checkpoints, but none that a request may still read.

vLLM loads an adapter from its folder again whenever it was evicted, in the middle of a step, and
does not survive a folder that is gone. So a surplus checkpoint is first retired in the store, upon
which the API servers withdraw its name. It is deleted when they have had time to, and the
scheduler, looking over its requests after that, found none that names it: by then each request
that an API server let through is the scheduler's.
"""

from __future__ import annotations

import logging
import math
import time
from pathlib import Path

from vllm_flexft.jobs.store import JobStore
from vllm_flexft.publish.checkpoint import remove_checkpoint, surplus
from vllm_flexft.publish.manifest import CheckpointError

logger = logging.getLogger("vllm.flexft")

# API servers look at the store every 0.25 s; the rest is for requests on their way to the engine.
GRACE_S = 2.0
SETTLE_S = 5.0  # a job's end waits so long for the scheduler to look: an engine may make no steps


NEVER: tuple[float, frozenset[str]] = (-math.inf, frozenset())


class Retirement:
    """`seen` is for the scheduler's thread, all else for the feed's."""

    def __init__(self) -> None:
        self._due: dict[Path, float] = {}
        # What reached the engine until then is done with or names one of these folders. One
        # attribute, since the other thread must not read half of it.
        self._look = self._last_look = NEVER

    @property
    def pending(self) -> bool:
        return bool(self._due)

    @property
    def awaits_look(self) -> bool:
        """Something is due that the scheduler has not looked for since."""
        now, (looked, _) = time.monotonic(), self._look
        return any(looked < due <= now for due in self._due.values())

    def seen(self, named: frozenset[str], now: float, *, step_runs: bool) -> None:
        """The scheduler looked over all requests that had reached the engine at `now`, a time of
        `time.monotonic`: they name these folders. Needed only while something is pending."""
        look = now, named
        if step_runs:  # with requests, maybe, that were aborted since it was scheduled
            earlier, named_then = self._last_look
            self._look = earlier, named | named_then
        else:
            self._look = look
        self._last_look = look

    def settled(self, output_dir: Path) -> bool:
        """Of what was retired there, only what a request still reads is left."""
        now, (looked, _) = time.monotonic(), self._look
        return not any(
            looked < due and now < due + SETTLE_S
            for path, due in self._due.items()
            if path.parent == output_dir
        )

    def retire(self, store: JobStore, output_dir: Path, save_total_limit: int | None) -> None:
        """Withdraw what exceeds the limit; it is deleted later."""
        paths = [path for path in surplus(output_dir, save_total_limit) if path not in self._due]
        store.retire_versions(paths)
        due = time.monotonic() + GRACE_S
        self._due.update(dict.fromkeys(paths, due))

    def delete_due(self) -> None:
        looked, named = self._look
        for path, due in list(self._due.items()):
            if looked < due or str(path) in named:
                continue
            del self._due[path]
            try:
                remove_checkpoint(path)
            except CheckpointError as error:
                logger.warning("%s", error)
