"""The model, the data and the jobs of the tests of a running server."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from make_model import make_model

    return make_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """64 prompts and completions of about 200 tokens: a step of 8 takes 0.1 s."""
    from sample_text import pirate_rows

    parts = list(pirate_rows(64 * 7, seed=0))
    lines = []
    for first in range(0, len(parts), 7):
        texts = [f"{row['prompt']} {row['completion']}" for row in parts[first + 1 : first + 7]]
        lines.append({"prompt": parts[first]["prompt"], "completion": " ".join(texts)})
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="session")
def make_job(rows: Path) -> Callable[..., dict[str, Any]]:
    """A job; keyword arguments go into its training section."""

    def make(name: str, **training: Any) -> dict[str, Any]:
        return {
            "name": name,
            "dataset": {"path": str(rows), "max_length": 256},
            "peft": {"r": 8},
            "training": {"learning_rate": 5e-3, **training},
        }

    return make
