"""Keeps this engine's jobs its own."""

from __future__ import annotations

import logging
import threading

from vllm_flexft.jobs.store import JobStore

logger = logging.getLogger("vllm.flexft")

HEARTBEAT_S = 5.0


class LeaseKeeper(threading.Thread):
    """Extends the leases of `owner`, whatever else the engine is busy with.

    A thread of its own, since the feed may tokenise a dataset for longer than a lease lasts.
    """

    def __init__(self, store: JobStore, owner: str) -> None:
        super().__init__(name="flexft-lease", daemon=True)
        self._store, self._owner = store, owner
        self._held: frozenset[str] = frozenset()
        self._beating = threading.Lock()  # an older answer must not replace a newer one
        self._stopping = threading.Event()

    def holds(self, job_id: str) -> bool:
        """As of the last beat: call `beat` after taking a lease."""
        return job_id in self._held

    def beat(self) -> None:
        with self._beating:
            self._held = frozenset(self._store.heartbeat(self._owner))

    def stop(self) -> None:
        self._stopping.set()

    def run(self) -> None:
        while not self._stopping.wait(HEARTBEAT_S):
            try:
                self.beat()
            except Exception:  # a full disk, a locked file: it may pass
                logger.exception("the lease of the finetune job could not be extended")
