"""Engines that share a state directory, and what a run finds there after a crash."""

from __future__ import annotations

import re
import shutil
import sqlite3
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from harness.run_state import check_checkpoints, metrics
from harness.server import TrainingProcess

from vllm_flexft.jobs.owner import new_owner
from vllm_flexft.jobs.store import JobStore

STEPS = 12


@pytest.fixture(scope="module")
def finished(
    tiny_model: Path,
    make_job: Callable[..., dict[str, Any]],
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, dict[str, Any], Path]:
    """State directory and job of a finished run, and a copy of its output folder."""
    state = tmp_path_factory.mktemp("state")
    job = make_job("tuned", max_steps=STEPS, save_steps=5)
    job["validation"] = job["dataset"] | {"every_steps": 6}
    run_to_end(tiny_model, state, [job])
    return state, job, Path(shutil.copytree(state / "adapters" / "tuned", state / "copy"))


def run_to_end(model: Path, state: Path, jobs: list[dict[str, Any]]) -> str:
    log = state / "log"
    log.unlink(missing_ok=True)
    assert TrainingProcess(model, state, jobs, log).wait() == 0, log.read_text()[-3000:]
    return log.read_text()


def trained_steps(log: Path) -> list[str]:
    """As "[name] step 3"."""
    return re.findall(r"(\[\w+\] step +\d+)/", log.read_text())


@pytest.mark.parametrize("published", [False, True], ids=["before", "after"])
def test_kill_around_the_publication_loses_nothing(
    tiny_model: Path, finished: tuple[Path, dict[str, Any], Path], published: bool
) -> None:
    """The last checkpoint is on disk, but its metrics and versions were not yet told of."""
    state, job, copy = finished
    output_dir = state / "adapters" / "tuned"
    for database in state.glob("jobs.sqlite3*"):
        database.unlink()
    if not published:
        for name in ("adapter_config.json", "adapter_model.safetensors", "final.json"):
            (output_dir / name).unlink()
    lines = (output_dir / "metrics.jsonl").read_text().splitlines(keepends=True)
    (output_dir / "metrics.jsonl").write_text("".join(lines[:-3]) + lines[-3][:20])

    run_to_end(tiny_model, state, [job])

    assert trained_steps(state / "log") == []
    ours, expected = (
        [(line["step"], "eval_loss" in line, line.get("loss")) for line in metrics(folder)]
        for folder in (output_dir, copy)
    )
    assert ours == expected
    assert check_checkpoints(output_dir) == [10, 12]
    store = JobStore(state / "jobs.sqlite3")
    names = [version.name for version in store.versions() if not version.retired]
    assert sorted(names) == ["tuned", "tuned@step-10", "tuned@step-12"]
    store.close()


def test_version_whose_folder_is_gone_is_retired_at_the_next_start(
    tiny_model: Path, finished: tuple[Path, dict[str, Any], Path]
) -> None:
    state, job, _ = finished
    store = JobStore(state / "jobs.sqlite3")
    with sqlite3.connect(state / "jobs.sqlite3") as database:
        database.execute("UPDATE versions SET retired = 0")
        database.execute("UPDATE jobs SET status = 'queued', finished_at = NULL")
    shutil.move(state / "adapters" / "tuned" / "checkpoint-10", state / "checkpoint-10")
    run_to_end(tiny_model, state, [job])
    kept = {version.name for version in store.versions() if not version.retired}
    shutil.move(state / "checkpoint-10", state / "adapters" / "tuned" / "checkpoint-10")
    store.close()
    assert kept == {"tuned", "tuned@step-12"}


def test_two_engines_never_train_the_same_job(
    tiny_model: Path, make_job: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    jobs = [make_job(name, max_steps=STEPS) for name in ("a", "b", "c")]
    engines = [TrainingProcess(tiny_model, tmp_path, jobs, tmp_path / f"log{i}") for i in range(2)]
    assert [engine.wait() for engine in engines] == [0, 0]
    steps = Counter(step for engine in engines for step in trained_steps(engine.log))
    assert len(steps) == 3 * STEPS
    assert set(steps.values()) == {1}
    store = JobStore(tmp_path / "jobs.sqlite3")
    assert {(job.status, job.attempts) for job in store.list()} == {("succeeded", 1)}
    store.close()


def test_engine_that_lost_its_lease_stops_and_leaves_the_job_alone(
    tiny_model: Path, make_job: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    engine = TrainingProcess(
        tiny_model, tmp_path, [make_job("long", max_steps=2000)], tmp_path / "log"
    )
    folder = tmp_path / "adapters" / "long"
    wait_for(lambda: (folder / "metrics.jsonl").exists() and len(metrics(folder)) > 2)
    with sqlite3.connect(tmp_path / "jobs.sqlite3") as database:  # as after a long sleep
        database.execute("UPDATE jobs SET lease_expires = 0")
    store, owner = JobStore(tmp_path / "jobs.sqlite3"), new_owner()
    [taken] = store.lease(owner)
    wait_for(lambda: "taken over by another engine" in engine.log.read_text())
    time.sleep(0.5)
    written = (folder / "metrics.jsonl").read_text()
    time.sleep(1.0)
    assert (folder / "metrics.jsonl").read_text() == written
    assert store.get("long").owner == taken.owner == owner
    store.finish(taken.id, "cancelled", owner=owner)  # ends the waiting engine
    assert engine.wait() == 0
    assert "Traceback" not in engine.log.read_text()
    store.close()


def wait_for(condition: Callable[[], bool], timeout: float = 240.0) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.01)
