"""A small model and engines on it, shared by the tests of whole runs."""

from __future__ import annotations

from pathlib import Path

import pytest
from harness.engine import CoServingEngine

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
