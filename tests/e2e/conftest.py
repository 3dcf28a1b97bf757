"""A small model and engines on it, shared by the tests of whole runs."""

from __future__ import annotations

from pathlib import Path

import pytest
from harness.beside import Undisturbed, job, weights
from harness.engine import CoServingEngine
from harness.health import health
from harness.traffic import train

BLOCK = 128  # tokens of a KV block on CPU


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from make_model import make_model

    return make_model(tmp_path_factory.mktemp("models") / "llama", arch="llama", size="tiny")


@pytest.fixture(scope="module")
def engine(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> CoServingEngine:
    """fp32, two serving slots."""
    return CoServingEngine(
        tiny_llama, tmp_path_factory.mktemp("state"), max_loras=2, max_num_seqs=12
    )


@pytest.fixture(scope="module")
def undisturbed(engine: CoServingEngine, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    """What `harness.beside.job` trains without anything beside it, and the engine after it."""
    folder = tmp_path_factory.mktemp("undisturbed")
    record, _ = train(engine, job(folder))
    assert record.status == "succeeded", record.error
    return weights(folder), health(engine, [])


@pytest.fixture(autouse=True)
def bursts_hold_nothing_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests ask for all at once, and want finetuning beside it. tests/sched/test_growth.py and
    test_planner.py test the hold."""
    monkeypatch.setattr("vllm_flexft.sched.planner.HORIZON_S", 0.0)
