"""Taking turns: of two real processes, one runs at a time."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from benchmarks.co_serving.client import Replay
from benchmarks.co_serving.measures import Update
from benchmarks.co_serving.processes import job_updates
from benchmarks.co_serving.systems import temporal, temporal_when_idle
from benchmarks.co_serving.trainer import read_log

SPIN = [sys.executable, "-c", "while True: pass"]
STOPPED = psutil.STATUS_STOPPED


class Spinner:
    """A busy process with the trainer's two verbs."""

    def __init__(self) -> None:
        self.process = psutil.Popen(SPIN)

    def go(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def stop(self) -> None:
        self.process.send_signal(signal.SIGSTOP)

    def updates(self) -> list[Update]:
        return []


@pytest.fixture
def pair() -> Iterator[tuple[Any, Spinner]]:
    engine, trainer = Spinner(), Spinner()
    trainer.stop()
    yield SimpleNamespace(engine=lambda: [engine.process]), trainer
    for spinner in (engine, trainer):
        spinner.process.kill()
        spinner.process.wait()


async def settles(trainer: Spinner, *, stopped: bool) -> bool:
    """Whether it is so within ten seconds: a signal acts when the process is next scheduled."""
    for _ in range(1000):
        if (trainer.process.status() == STOPPED) == stopped:
            return True
        await asyncio.sleep(0.01)
    return False


async def watch(
    system: Any, server: Any, trainer: Spinner, replay: Replay
) -> list[tuple[bool, bool]]:
    """(engine runs, trainer runs), looked at often while the system is on."""
    (engine,), seen = server.engine(), []
    async with system.running(replay):
        for _ in range(60):
            await asyncio.sleep(0.011)
            states = (engine.status(), trainer.process.status())
            seen.append((states[0] != STOPPED, states[1] != STOPPED))
    return seen


def test_in_turns_one_process_runs_at_a_time(pair: tuple[Any, Spinner]) -> None:
    server, trainer = pair
    replay = Replay("http://nowhere", "m")
    seen = asyncio.run(watch(temporal(0.1, server, trainer), server, trainer, replay))
    # A process that is told to stop does so when it is next scheduled.
    assert seen.count((True, True)) < 0.5 * len(seen)
    shares = [sum(who[i] for who in seen) / len(seen) for i in range(2)]
    assert min(shares) > 0.1, shares  # half each, seen through a busy machine
    assert server.engine()[0].status() != STOPPED
    assert asyncio.run(settles(trainer, stopped=True))


def test_the_trainer_runs_when_no_request_is_in_flight(pair: tuple[Any, Spinner]) -> None:
    server, trainer = pair
    replay = Replay("http://nowhere", "m")

    async def act() -> list[bool]:
        seen = []
        async with temporal_when_idle(server, trainer).running(replay):
            for in_flight in (0, 2, 0, 1):
                replay.in_flight = in_flight
                seen.append(await settles(trainer, stopped=bool(in_flight)))
        return seen

    assert all(asyncio.run(act()))


def test_the_trainers_log_is_read_up_to_its_last_whole_line(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    assert read_log(log) == (None, [])
    log.write_text('{"micro_batch": 2}\n{"time": 5.0, "tokens": 700}\n{"time": 9.')
    assert read_log(log) == (2, [Update(5.0, 700)])


def test_a_jobs_updates_are_the_differences_of_its_running_count(tmp_path: Path) -> None:
    lines = [
        '{"step": 1, "num_input_tokens": 700, "time": 5.0}',
        '{"step": 1, "eval_loss": 2.0, "time": 5.5}',
        '{"step": 2, "num_input_tokens": 1500, "time": 9.0}',
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    assert job_updates(tmp_path) == [Update(5.0, 700), Update(9.0, 800)]
