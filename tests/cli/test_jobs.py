"""`flexft jobs` and `flexft cancel` over a real job store."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from vllm_flexft.cli.main import main
from vllm_flexft.config import FinetuneJob
from vllm_flexft.jobs.owner import new_owner
from vllm_flexft.jobs.states import JobStatus
from vllm_flexft.jobs.store import JobStore


@pytest.fixture
def store(tmp_path: Path) -> JobStore:
    return JobStore(tmp_path / "jobs.sqlite3")


def submit(store: JobStore, folder: Path, name: str) -> str:
    job = FinetuneJob.from_mapping(
        {"name": name, "dataset": {"path": "rows.jsonl"}, "output_dir": str(folder / name)}
    )
    return store.submit(job, model="model").id


def flexft(command: str, *arguments: str, state_dir: Path) -> int:
    return main([command, *arguments, "--state-dir", str(state_dir)])


def owner_that_has_died() -> str:
    code = "from vllm_flexft.jobs.owner import new_owner; print(new_owner())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def lines_of(capsys: pytest.CaptureFixture[str]) -> list[list[str]]:
    return [line.split(maxsplit=4) for line in capsys.readouterr().out.splitlines()]


def test_jobs_are_listed_with_state_step_model_and_where_the_adapter_is(
    store: JobStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    running, failed, _ = (submit(store, tmp_path, name) for name in ("runs", "fails", "waits"))
    owner = new_owner()
    store.lease(owner, 2)
    store.progress(running, 3, 12, {"loss": 1.0}, owner=owner)
    store.finish(failed, JobStatus.FAILED, "loss is nan\nat step 1", owner=owner)
    store.refuse("bad.yaml", "bad.yaml", "lora: unknown key")
    assert flexft("jobs", state_dir=tmp_path) == 0
    assert lines_of(capsys)[1:] == [
        ["runs", "running", "3/12", "model", str(tmp_path / "runs")],
        ["fails", "failed", "-", "model", "loss is nan at step 1"],
        ["waits", "queued", "-", "model", str(tmp_path / "waits")],
        ["bad.yaml", "refused", "-", "-", "lora: unknown key"],
    ]


def test_a_job_whose_engine_died_is_shown_as_interrupted(
    store: JobStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    submit(store, tmp_path, "a")
    store.lease(owner_that_has_died())
    flexft("jobs", state_dir=tmp_path)
    assert lines_of(capsys)[1][:2] == ["a", "interrupted"]
    flexft("cancel", "a", state_dir=tmp_path)
    assert "next server" in capsys.readouterr().out
    assert store.lease(new_owner()) == []
    assert store.get("a").status == "cancelled"


def test_a_waiting_job_is_dropped(
    store: JobStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    submit(store, tmp_path, "a")
    assert flexft("cancel", "a", state_dir=tmp_path) == 0
    assert capsys.readouterr().out == "a: cancelled\n"
    assert store.get("a").status == "cancelled"


def test_a_running_job_is_asked_to_stop(
    store: JobStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job_id = submit(store, tmp_path, "a")
    store.lease(new_owner())
    assert flexft("cancel", "a", state_dir=tmp_path) == 0
    assert "its server stops it" in capsys.readouterr().out
    assert store.cancel_requested(job_id)
    flexft("jobs", state_dir=tmp_path)
    assert lines_of(capsys)[1][1] == "cancelling"


def test_what_cannot_be_cancelled_is_told(
    store: JobStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    submit(store, tmp_path, "a")
    assert flexft("cancel", "b", state_dir=tmp_path) == 2
    assert "no job 'b'; there are: a" in capsys.readouterr().err
    flexft("cancel", "a", state_dir=tmp_path)
    assert flexft("cancel", "a", state_dir=tmp_path) == 2
    assert "has already ended: cancelled" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["jobs"], ["cancel", "a"]])
def test_a_folder_without_a_store_is_told_of_and_stays_as_it_is(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert flexft(*command, state_dir=tmp_path / "none") == 2
    assert "none/jobs.sqlite3; --state-dir" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_without_a_command_the_help_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    assert "cancel" in capsys.readouterr().out
