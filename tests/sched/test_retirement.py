"""Surplus checkpoints are withdrawn at once and deleted when nobody can read them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from vllm.lora.request import LoRARequest

from benchmarks.bare_scheduler import BareEngine
from vllm_flexft.jobs.store import JobStore
from vllm_flexft.sched import retirement
from vllm_flexft.sched.retirement import Retirement


@pytest.fixture
def output_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three checkpoints, all taken for sound."""
    from vllm_flexft.publish import checkpoint

    monkeypatch.setattr(checkpoint, "_is_sound", lambda path: True)
    for step in (1, 2, 3):
        (tmp_path / "out" / f"checkpoint-{step}").mkdir(parents=True)
    return tmp_path / "out"


@pytest.fixture
def store(tmp_path: Path) -> JobStore:
    return JobStore(tmp_path / "jobs.sqlite3")


@pytest.fixture
def no_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retirement, "GRACE_S", 0.0)


def left(output_dir: Path) -> list[str]:
    return sorted(path.name for path in output_dir.iterdir())


def look(retiring: Retirement, *named: Path, at: float | None = None, step_runs: bool = False):
    """As the scheduler does before a step; then the feed's turn."""
    now = time.monotonic() if at is None else at
    retiring.seen(frozenset(map(str, named)), now, step_runs=step_runs)
    retiring.delete_due()


def test_nothing_is_deleted_before_the_grace_is_over(output_dir, store, monkeypatch):
    monkeypatch.setattr(retirement, "GRACE_S", 60.0)
    retiring = Retirement()
    retired = time.monotonic()
    retiring.retire(store, output_dir, 2)
    look(retiring, at=retired + 59.0)
    assert retiring.pending
    assert left(output_dir) == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]


def test_surplus_is_deleted_after_the_grace(output_dir, store, no_grace):
    retiring = Retirement()
    retiring.retire(store, output_dir, 2)
    look(retiring)
    assert not retiring.pending
    assert left(output_dir) == ["checkpoint-2", "checkpoint-3"]


def test_nothing_is_deleted_while_a_long_step_lasts(output_dir, store, no_grace):
    """Requests that came meanwhile wait in the engine's queue, unknown to the scheduler."""
    retiring = Retirement()
    look(retiring)
    retiring.retire(store, output_dir, 1)
    retiring.delete_due()
    assert retiring.awaits_look
    assert left(output_dir) == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]
    look(retiring, output_dir / "checkpoint-1")
    assert not retiring.awaits_look
    assert left(output_dir) == ["checkpoint-1", "checkpoint-3"]


def test_folder_that_a_request_names_stays_until_the_request_is_gone(output_dir, store, no_grace):
    retiring = Retirement()
    retiring.retire(store, output_dir, 1)
    look(retiring, output_dir / "checkpoint-1")
    assert left(output_dir) == ["checkpoint-1", "checkpoint-3"]
    assert retiring.settled(output_dir)
    look(retiring)
    assert left(output_dir) == ["checkpoint-3"]


def test_folder_that_the_running_step_may_name_stays(output_dir, store, no_grace):
    """Its request may have been aborted since the step was scheduled."""
    retiring = Retirement()
    retiring.retire(store, output_dir, 1)
    for named in ([output_dir / "checkpoint-1"], []):
        look(retiring, *named, step_runs=True)
        assert "checkpoint-1" in left(output_dir)
    look(retiring, step_runs=True)
    assert left(output_dir) == ["checkpoint-3"]


def test_a_folder_is_settled_when_it_is_as_it_will_stay(output_dir, store, monkeypatch):
    monkeypatch.setattr(retirement, "GRACE_S", 0.0)
    retiring = Retirement()
    retiring.retire(store, output_dir, 2)
    assert not retiring.settled(output_dir)
    assert retiring.settled(output_dir.parent)
    monkeypatch.setattr(retirement, "SETTLE_S", 0.0)
    assert retiring.settled(output_dir), "an engine that makes no steps never looks"


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BareEngine]:
    engine = BareEngine(tmp_path_factory.mktemp("engine"), blocks=60)
    yield engine
    engine.close()


def test_the_scheduler_looks_before_each_step_and_when_it_is_idle(
    engine, output_dir, store, no_grace
):
    """A request comes for a checkpoint that is withdrawn while a step runs."""
    retiring = engine.scheduler._feed.retirement
    adapter = LoRARequest("job@step-1", 7, str(output_dir / "checkpoint-1"))
    engine.ask(8, 2)
    engine.step(during=lambda output: retiring.retire(store, output_dir, 1))
    retiring.delete_due()
    assert len(left(output_dir)) == 3
    engine.ask(8, 3, lora_request=adapter)
    while engine.scheduler.requests:
        engine.step()
        retiring.delete_due()
        assert left(output_dir) == ["checkpoint-1", "checkpoint-3"]
    while engine.scheduler.has_requests():
        engine.step()
    retiring.delete_due()
    assert left(output_dir) == ["checkpoint-3"]
