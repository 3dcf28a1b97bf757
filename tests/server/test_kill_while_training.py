"""kill -9 at any moment of a run: the run ends as if it had never been disturbed."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from harness.run_state import assert_same_run, check_checkpoints, metrics
from harness.server import TrainingProcess

STEPS, SAVE_STEPS = 30, 3


@dataclass(frozen=True)
class Moment:
    """Kill `seconds` after the `nth` new file of this pattern has been seen."""

    pattern: str
    nth: int = 1
    seconds: float = 0.0


DICE = random.Random(0)
TRAINING = [Moment("metrics.jsonl", seconds=DICE.uniform(0, 0.6)) for _ in range(4)]
WRITING = [Moment(".tmp-checkpoint-*", nth, DICE.uniform(0, 0.006)) for nth in (1, 3, 2, 1)]
PUBLISHING = [Moment(".tmp-adapter_*"), Moment(".tmp-adapter_*", seconds=0.003)]
KILLS = [moment for pair in zip(TRAINING, WRITING, strict=True) for moment in pair] + PUBLISHING


@pytest.fixture(scope="module")
def job(make_job: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    return make_job("tuned", max_steps=STEPS, save_steps=SAVE_STEPS)


@pytest.fixture(scope="module")
def undisturbed(
    tiny_model: Path, job: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    state = tmp_path_factory.mktemp("undisturbed")
    assert TrainingProcess(tiny_model, state, [job], state / "log").wait() == 0
    return state / "adapters" / "tuned"


def kill_at(moment: Moment, run: TrainingProcess, output_dir: Path) -> str:
    """Kill the run at this moment; what it left."""
    log = output_dir / "metrics.jsonl"
    seen, length = set(output_dir.glob(".tmp-*")), _size(log)
    count, deadline = 0, time.monotonic() + 240
    while count < moment.nth:
        assert time.monotonic() < deadline, run.log.read_text()[-3000:]
        if moment.pattern == log.name:  # there since an earlier run: it must have changed
            count += _size(log) not in (0, length)
        else:
            fresh = set(output_dir.glob(moment.pattern)) - seen
            seen |= fresh
            count += len(fresh)
        time.sleep(0.0002)
    time.sleep(moment.seconds)
    assert run.process.is_alive(), "it ended before it could be killed"
    run.kill()
    left = sorted(path.name for path in output_dir.glob(".tmp-*"))
    return f"step {metrics(output_dir)[-1]['step'] if _size(log) else 0}, left {left}"


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def test_ten_kills_end_with_the_undisturbed_adapter_and_metrics(
    tiny_model: Path,
    job: dict[str, Any],
    undisturbed: Path,
    tmp_path: Path,
) -> None:
    output_dir = tmp_path / "adapters" / "tuned"
    for number, moment in enumerate(KILLS, start=1):
        run = TrainingProcess(tiny_model, tmp_path, [job], tmp_path / "log")
        happened = kill_at(moment, run, output_dir)
        print(f"kill {number} at {moment}: {happened}; sound: {check_checkpoints(output_dir)}")
    assert TrainingProcess(tiny_model, tmp_path, [job], tmp_path / "log").wait() == 0
    check_checkpoints(output_dir)
    difference = assert_same_run(output_dir, undisturbed)
    print(f"largest difference of the adapters: {difference}")
    assert not list(output_dir.glob(".tmp-*"))
