"""A trainer that failed trains no more, but what it had written is not lost."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from harness.backward import trainer_of

from vllm_flexft.plan import SaveRequest, StepPlan
from vllm_flexft.publish.checkpoint import TrainState, latest_checkpoint


def test_what_was_written_before_a_failure_is_told_with_it(bench: Any, tmp_path: Path) -> None:
    trainer = trainer_of(bench("llama").served_model(), 64, 64)
    trainer.setup = dataclasses.replace(trainer.setup, output_dir=str(tmp_path))
    trainer._save(SaveRequest(step=3, counters={}, final=False))
    assert trainer._writer.drain(120)
    trainer.fail(RuntimeError("out of memory"))
    (result,) = trainer.step(StepPlan(job_id="job"))
    assert result.error == "RuntimeError: out of memory"
    assert [(written.step, written.path) for written in result.written] == [
        (3, str(latest_checkpoint(tmp_path)))
    ]
    (result,) = trainer.step(StepPlan(job_id="job"))
    assert result.written == ()


def test_the_end_of_a_job_copies_its_state_once(
    bench: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    trainer = trainer_of(bench("llama").served_model(), 64, 64)
    trainer.setup = dataclasses.replace(trainer.setup, output_dir=str(tmp_path))
    copies, snapshot = [], TrainState.snapshot
    monkeypatch.setattr(
        TrainState, "snapshot", lambda self: copies.append(snapshot(self)) or copies[-1]
    )
    trainer._save(SaveRequest(step=3, counters={}, final=True))
    assert trainer._writer.drain(120)
    assert [written.final for written in trainer._written(wait=False)] == [False, True]
    assert len(copies) == 1
