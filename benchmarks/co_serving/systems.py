"""What is compared: each system says what happens beside the traffic while a load runs."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.co_serving.client import Replay
from benchmarks.co_serving.measures import Update
from benchmarks.co_serving.processes import InferenceServer, Trainer, job_updates

TURNS_S = (0.05, 0.5)  # of temporal sharing: half of each for serving, half for training
POLL_S = 0.005


@dataclass(frozen=True)
class System:
    """A server, and what trains beside it.

    Args:
        running: what holds while the load runs.
        updates: the optimizer updates so far; of the peft trainer, its micro-batches.
    """

    name: str
    server: InferenceServer
    running: Callable[[Replay], AbstractAsyncContextManager[None]]
    updates: Callable[[], Sequence[Update]]


def inference_only(server: InferenceServer) -> System:
    @contextlib.asynccontextmanager
    async def running(replay: Replay) -> AsyncIterator[None]:
        yield

    return System("inference", server, running, list)


def co_serving(server: InferenceServer, output_dir: Path) -> System:
    """The job runs in the server; between loads the server is paused."""

    @contextlib.asynccontextmanager
    async def running(replay: Replay) -> AsyncIterator[None]:
        await asyncio.to_thread(server.resume)
        try:
            yield
        finally:
            await asyncio.to_thread(server.pause)

    return System("co_serving", server, running, lambda: job_updates(output_dir))


def spatial(name: str, server: InferenceServer, trainer: Trainer) -> System:
    """Both processes run; the operating system shares the cores out."""

    @contextlib.asynccontextmanager
    async def running(replay: Replay) -> AsyncIterator[None]:
        trainer.go()
        try:
            yield
        finally:
            trainer.stop()

    return System(name, server, running, trainer.updates)


def temporal(turn_s: float, server: InferenceServer, trainer: Trainer) -> System:
    """The engine and the trainer take turns of half of `turn_s` each, the other one stopped."""

    async def take_turns(engine: Sequence[int]) -> None:
        while True:
            _signal(engine, signal.SIGSTOP)
            trainer.go()
            await asyncio.sleep(turn_s / 2)
            trainer.stop()
            _signal(engine, signal.SIGCONT)
            await asyncio.sleep(turn_s / 2)

    name = f"temporal_{round(turn_s * 1e3)}ms"
    return System(name, server, lambda _: _beside(take_turns, server, trainer), trainer.updates)


def temporal_when_idle(server: InferenceServer, trainer: Trainer) -> System:
    """The trainer's turn lasts while no request is in the server, which the client knows at once:
    no scheduler of processes could know it earlier."""

    @contextlib.asynccontextmanager
    async def running(replay: Replay) -> AsyncIterator[None]:
        async def follow(_: Sequence[int]) -> None:
            training = False
            while True:
                if training != (replay.in_flight == 0):
                    training = not training
                    (trainer.go if training else trainer.stop)()
                await asyncio.sleep(POLL_S)

        async with _beside(follow, server, trainer):
            yield

    return System("temporal_idle", server, running, trainer.updates)


@contextlib.asynccontextmanager
async def _beside(
    act: Callable[[Sequence[int]], object], server: InferenceServer, trainer: Trainer
) -> AsyncIterator[None]:
    """Run `act(engine)` as a task; afterwards the engine runs and the trainer does not."""
    engine = [process.pid for process in server.engine()]
    task = asyncio.ensure_future(act(engine))  # type: ignore[arg-type]
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        trainer.stop()
        _signal(engine, signal.SIGCONT)


def _signal(pids: Sequence[int], number: signal.Signals) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
