"""Surplus checkpoints are withdrawn at once and deleted when nobody can read them."""

from __future__ import annotations

from pathlib import Path

import pytest

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


def left(output_dir: Path) -> list[str]:
    return sorted(path.name for path in output_dir.iterdir())


def test_nothing_is_deleted_before_the_grace_is_over(output_dir, store, monkeypatch):
    monkeypatch.setattr(retirement, "GRACE_S", 3600.0)
    retiring = Retirement()
    retiring.retire(store, output_dir, 2)
    retiring.delete_due()
    assert retiring.pending
    assert left(output_dir) == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]


def test_surplus_is_deleted_after_the_grace(output_dir, store, monkeypatch):
    monkeypatch.setattr(retirement, "GRACE_S", 0.0)
    retiring = Retirement()
    retiring.retire(store, output_dir, 2)
    retiring.delete_due()
    assert not retiring.pending
    assert left(output_dir) == ["checkpoint-2", "checkpoint-3"]


def test_folder_that_a_request_names_stays_until_the_request_is_gone(
    output_dir, store, monkeypatch
):
    monkeypatch.setattr(retirement, "GRACE_S", 0.0)
    retiring = Retirement()
    retiring.retire(store, output_dir, 1)
    retiring.in_use = frozenset({str(output_dir / "checkpoint-1")})
    retiring.delete_due()
    assert left(output_dir) == ["checkpoint-1", "checkpoint-3"]
    retiring.in_use = frozenset()
    retiring.delete_due()
    assert left(output_dir) == ["checkpoint-3"]
