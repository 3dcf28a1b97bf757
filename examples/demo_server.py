"""`vllm serve` as a subprocess: start, wait until it answers, shut down."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

import httpx

STARTED_IN_S = 240.0  # 20 to 30 s are usual on two cores
STOPPED_IN_S = 30.0
# vLLM's API server waits on when its engine could not start: this line is how one can tell.
ENGINE_FAILED = "EngineCore failed to start"
# Long lists at the server's start and end that would hide an error.
NOT_TOLD = (" Route: ", " - leaked ", "nanobind", "skipped remainder", "[shutdown]")


class DemoError(RuntimeError):
    """What went wrong, and the end of the server's log where that helps."""


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


class Server:
    """A server process with its log in a file; a context manager.

    It has a session of its own, so that Ctrl-C reaches it once, from us.
    """

    def __init__(
        self, command: Sequence[str], log: Path, *, port: int, environment: Mapping[str, str]
    ) -> None:
        self.command, self.log, self.port = list(command), log, port
        self._environment = {**os.environ, **environment}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> Server:
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                self.command,
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=self._environment,
                process_group=0,
            )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def check(self) -> None:
        """Raises DemoError if the server has ended, or its engine could not start."""
        if (status := self._process.poll()) is not None:
            raise self.failure(f"the server ended with exit status {status}")
        if ENGINE_FAILED in self.log.read_text(errors="replace"):
            raise self.failure("the server's engine could not start")

    def failure(self, what: str) -> DemoError:
        """An error with the end of the log."""
        lines = self.log.read_text(errors="replace").splitlines()
        told = [line for line in lines if not any(word in line for word in NOT_TOLD)]
        tail = "\n".join(f"  | {line[:200]}" for line in told[-25:])
        return DemoError(f"{what}. The end of the server's log, {self.log}:\n{tail}")

    def wait_until_ready(self) -> None:
        """Return once the server answers. Raises DemoError if it ends or takes too long."""
        deadline = time.monotonic() + STARTED_IN_S
        while time.monotonic() < deadline:
            self.check()
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"{self.url}/health", timeout=5.0).status_code == 200:
                    return
            time.sleep(0.5)
        raise self.failure(f"the server did not answer within {STARTED_IN_S:.0f} s")

    def stop(self) -> None:
        """Ask it to end, and make sure that nothing of it is left."""
        try:
            if self._process.poll() is None:
                self._process.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(timeout=STOPPED_IN_S)
        finally:
            # The group started above: API server, engine and worker.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
