from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from vllm_flexft.config import FinetuneJob
from vllm_flexft.jobs import JobStore


@pytest.fixture
def make_job(tmp_path: Path) -> Callable[..., FinetuneJob]:
    def make(name: str = "gsm8k", **keys: Any) -> FinetuneJob:
        defaults = {
            "dataset": {"path": "train.jsonl"},
            "output_dir": str(tmp_path / "adapters" / name),
        }
        return FinetuneJob.from_mapping({"name": name, **defaults, **keys})

    return make


@pytest.fixture
def store(tmp_path: Path) -> Iterator[JobStore]:
    store = JobStore(tmp_path / "state" / "jobs.sqlite")
    yield store
    store.close()
