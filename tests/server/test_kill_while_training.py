"""kill -9 at any moment of a run: the run ends as if it had never been disturbed."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from harness.run_state import assert_same_run, check_checkpoints, metrics
from harness.server import TrainingProcess

STEPS, SAVE_STEPS = 30, 3
# What to see in the output folder before the kill, and how long to wait after it (at most, s).
TRAINING = ("metrics.jsonl", 0.6)  # somewhere in forward, backward or update
WRITING = (".tmp-checkpoint-*", 0.006)  # of about 20 ms
PUBLISHING = (".tmp-adapter_*", 0.004)
KILLS = [TRAINING, WRITING] * 4 + [PUBLISHING] * 2


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


def kill_when_seen(run: TrainingProcess, output_dir: Path, pattern: str, after_s: float) -> str:
    """Kill the run once a file of this pattern is there that was not before; what happened."""
    known = set(output_dir.glob(pattern)) - {output_dir / "metrics.jsonl"}
    length = _size(output_dir / "metrics.jsonl")
    deadline = time.monotonic() + 60
    while run.process.is_alive() and time.monotonic() < deadline:
        fresh = set(output_dir.glob(pattern)) - known
        if pattern == "metrics.jsonl":  # there since the last run: it must have changed
            fresh = {pattern} if _size(output_dir / pattern) not in (0, length) else set()
        if fresh:
            time.sleep(after_s)
            break
        time.sleep(0.0002)
    ended = not run.process.is_alive()
    run.kill()
    left = sorted(path.name for path in output_dir.glob(".tmp-*"))
    step = metrics(output_dir)[-1]["step"] if _size(output_dir / "metrics.jsonl") else 0
    return f"step {step:2d}, left {left or 'nothing'}{', had ended' if ended else ''}"


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
    record_property: Callable[[str, object], None],
) -> None:
    output_dir, dice = tmp_path / "adapters" / "tuned", random.Random(0)
    for number, (pattern, longest) in enumerate(KILLS, start=1):
        run = TrainingProcess(tiny_model, tmp_path, [job], tmp_path / "log")
        happened = kill_when_seen(run, output_dir, pattern, dice.uniform(0, longest))
        print(f"kill {number} at {pattern}: {happened}; sound: {check_checkpoints(output_dir)}")
    assert TrainingProcess(tiny_model, tmp_path, [job], tmp_path / "log").wait() == 0
    check_checkpoints(output_dir)
    record_property("adapter_difference", assert_same_run(output_dir, undisturbed))
    assert not list(output_dir.glob(".tmp-*"))
