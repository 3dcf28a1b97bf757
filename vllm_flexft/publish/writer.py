"""A thread that writes checkpoints and final adapters, so that no engine step waits for a disk."""

import logging
import threading
from collections import deque
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from vllm_flexft.config import PeftConfig
from vllm_flexft.publish.checkpoint import TrainState, write_checkpoint
from vllm_flexft.publish.final import publish_final

logger = logging.getLogger("vllm.flexft")


@dataclass(frozen=True)
class WriteRequest:
    """One thing to write."""

    kind: Literal["checkpoint", "final"]
    output_dir: Path
    state: TrainState
    peft: PeftConfig
    base_model: str
    config_hash: str


@dataclass(frozen=True)
class WriteResult:
    """What became of a request: `path` or `error`."""

    ticket: int
    kind: Literal["checkpoint", "final"]
    output_dir: Path
    step: int
    path: Path | None = None
    error: BaseException | None = None


class CheckpointWriter:
    """Writes in the order of submission. All methods may be called from any thread.

    Each waiting request holds a copy of the adapter and its moments (12 bytes a trained
    parameter with AdamW), hence `max_waiting`.
    """

    def __init__(self, max_waiting: int = 2) -> None:
        self._max_waiting = max_waiting
        self._waiting: deque[tuple[int, WriteRequest]] = deque()
        self._results: list[WriteResult] = []
        self._changed = threading.Condition()
        self._writing = False
        self._closed = False
        self._tickets = 0
        self._thread = threading.Thread(target=self._run, name="flexft-writer", daemon=True)
        self._thread.start()

    def submit(self, *requests: WriteRequest) -> int:
        """Queue requests of one state, and return the ticket of the last, without waiting for the
        disk.

        The state is copied, once, before this returns: the trainer may go on writing to its
        masters.
        A checkpoint that finds the queue full is not written, and its result says so: the disk
        is slower than `save_steps` asks for. A final adapter is always taken.
        """
        assert all(request.state is requests[0].state for request in requests)
        snapshot = None
        with self._changed:
            assert not self._closed, "submit after close"
            for request in requests:
                self._tickets += 1
                if request.kind == "checkpoint" and len(self._waiting) >= self._max_waiting:
                    error = RuntimeError(
                        f"checkpoint-{request.state.step} is skipped: {self._max_waiting} earlier "
                        "ones still wait for the disk; raise training.save_steps"
                    )
                    self._results.append(_result(self._tickets, request, error=error))
                    continue
                if snapshot is None:
                    snapshot = request.state.snapshot()
                self._waiting.append((self._tickets, replace(request, state=snapshot)))
            self._changed.notify_all()
            return self._tickets

    def poll(self) -> list[WriteResult]:
        """The results since the last call, each handed out once."""
        with self._changed:
            results, self._results = self._results, []
            return results

    def drain(self, timeout: float | None = None) -> bool:
        """Wait until everything submitted is written or has failed; False at the timeout (s)."""
        with self._changed:
            return self._changed.wait_for(
                lambda: not self._waiting and not self._writing, timeout=timeout
            )

    def close(self, timeout: float | None = None) -> bool:
        """Drain and end the thread; False if the timeout (s) passed first."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if not self._waiting:
                    return
                ticket, request = self._waiting.popleft()
                self._writing = True
            result = _write(ticket, request)
            with self._changed:
                self._results.append(result)
                self._writing = False
                self._changed.notify_all()


def _write(ticket: int, request: WriteRequest) -> WriteResult:
    path = None
    write = write_checkpoint if request.kind == "checkpoint" else publish_final
    # A thread has no caller to raise to: whatever happens becomes the result.
    try:
        path = write(
            request.output_dir,
            request.state,
            request.peft,
            request.base_model,
            request.config_hash,
        )
    except BaseException as e:
        logger.error("writing %s of step %d failed: %s", request.kind, request.state.step, e)
        return _result(ticket, request, path, e)
    return _result(ticket, request, path)


def _result(
    ticket: int,
    request: WriteRequest,
    path: Path | None = None,
    error: BaseException | None = None,
) -> WriteResult:
    return WriteResult(ticket, request.kind, request.output_dir, request.state.step, path, error)
