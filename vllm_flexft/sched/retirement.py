"""Removes surplus checkpoints, but none that a request may still read.

vLLM loads an adapter from its folder again whenever it was evicted, in the middle of a step, and
does not survive a folder that is gone. So a surplus checkpoint is first retired in the store, upon
which the API servers withdraw its name, and deleted only when they have had time to and no request
of the engine names it.
"""

from __future__ import annotations

import logging
import time
from pathlib import Path

from vllm_flexft.jobs.store import JobStore
from vllm_flexft.publish.checkpoint import remove_checkpoint, surplus
from vllm_flexft.publish.manifest import CheckpointError

logger = logging.getLogger("vllm.flexft")

GRACE_S = 1.0  # API servers look at the store every 0.25 s


class Retirement:
    def __init__(self) -> None:
        # Folders of the adapters that the engine's requests name; the scheduler keeps it current
        # while anything is pending.
        self.in_use: frozenset[str] = frozenset()
        self._due: dict[Path, float] = {}

    @property
    def pending(self) -> bool:
        return bool(self._due)

    def in_grace(self, output_dir: Path) -> bool:
        """Something of it is withdrawn that API servers may not have seen yet."""
        now = time.monotonic()
        return any(due > now for path, due in self._due.items() if path.parent == output_dir)

    def retire(self, store: JobStore, output_dir: Path, save_total_limit: int | None) -> None:
        """Withdraw what exceeds the limit; it is deleted later."""
        paths = [path for path in surplus(output_dir, save_total_limit) if path not in self._due]
        store.retire_versions(paths)
        due = time.monotonic() + GRACE_S
        self._due.update(dict.fromkeys(paths, due))

    def delete_due(self) -> None:
        now = time.monotonic()
        for path, due in list(self._due.items()):
            if now < due or str(path) in self.in_use:
                continue
            del self._due[path]
            try:
                remove_checkpoint(path)
            except CheckpointError as error:
                logger.warning("%s", error)
