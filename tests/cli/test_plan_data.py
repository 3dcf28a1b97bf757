"""What `flexft plan` says of a job's data."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from harness.plan_command import Write, run

from vllm_flexft.cli.plan_data import DataPlan
from vllm_flexft.config import FinetuneJob
from vllm_flexft.data.dataset import DataReport


@pytest.fixture
def with_tokenizer(write: Write) -> str:
    from make_model import make_tokenizer

    model = write()
    make_tokenizer(512, add_bos=True).save_pretrained(model)
    return model


def job_over(folder: Path, rows: int, **training: Any) -> str:
    row = '{"prompt": "one two", "completion": " three"}\n'
    (folder / "rows.jsonl").write_text(row * rows)
    job = FinetuneJob.from_mapping(
        {"name": "j", "dataset": {"path": str(folder / "rows.jsonl")}, "training": training}
    )
    (folder / "job.yaml").write_text(job.to_yaml())
    return str(folder / "job.yaml")


def test_steps_and_tokens_of_the_data_are_counted(
    with_tokenizer: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = job_over(tmp_path, 10, train_batch_size=4, num_train_epochs=2)
    status, text, _ = run(capsys, with_tokenizer, job)
    assert status == 0
    found = re.search(r"10 sequences of 10 rows; (\d+) tokens", text)
    assert found, text
    assert f"steps: 6, of {2 * int(found[1])} tokens together" in text


def test_time_is_the_tokens_over_the_predicted_speed() -> None:
    report = DataReport(1, 1, 0, 0, 0, 100, 50, 1024)
    plan = DataPlan("", report, steps=3, tokens=36_000.0)
    assert plan.lines(1000.0)[-1] == "expected duration when idle: 36 s"
    assert plan.lines(10.0)[-1] == "expected duration when idle: 60 min"
    assert plan.lines(1.0)[-1] == "expected duration when idle: 10.0 h"


def test_a_job_whose_data_is_wrong_is_told_as_refused(
    with_tokenizer: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = job_over(tmp_path, 3)
    (tmp_path / "rows.jsonl").write_text('{"q": "a"}\n')
    status, text, error = run(capsys, with_tokenizer, job)
    assert status == 1
    assert "for a micro-batch" in text
    assert "the job would be refused: " in error
    assert "no known format has these columns: q" in error
    (tmp_path / "rows.jsonl").unlink()
    status, _, error = run(capsys, with_tokenizer, job)
    assert (status, "rows.jsonl: no such file" in error) == (1, True)


def test_without_a_tokenizer_the_data_is_not_counted(
    write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, text, _ = run(capsys, write(), job_over(tmp_path, 3))
    assert status == 0
    assert "data: not counted: no tokenizer in" in text
