"""Whatever becomes of a job, its end is told once and the engine goes on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.bare_scheduler import BareEngine, prepared_job
from vllm_flexft.plan import StepResult, Written
from vllm_flexft.sched.progress import EndRecord, WrittenRecord


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[BareEngine]:
    engine = BareEngine(tmp_path / "engine", blocks=60)
    engine.train(prepared_job(np.full(50, 40), tmp_path / "out", max_steps=10**6))
    for _ in range(5):
        engine.step()
    yield engine
    engine.close()


def test_an_error_while_a_job_is_ended_leaves_the_engine_alive(
    engine: BareEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    feed = engine.scheduler._feed

    def fail(*_: Any) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(feed, "save", fail)
    engine.worker.run = lambda plan: StepResult(plan.job_id, error="loss is nan")
    engine.step()
    assert [r for r in feed.reported if isinstance(r, EndRecord)] == [EndRecord("loss is nan")]
    name = engine.ask(8, 2)
    while engine.scheduler.requests:
        engine.step()
    assert name not in engine.scheduler.requests


def test_a_checkpoint_written_before_a_failure_is_announced_before_its_end(
    engine: BareEngine,
) -> None:
    written = Written(3, "/out/checkpoint-3", False)
    engine.worker.run = lambda plan: StepResult(plan.job_id, error="bad", written=(written,))
    engine.step()
    assert engine.scheduler._feed.reported[-2:] == [WrittenRecord(written), EndRecord("bad")]
