"""A model that is nothing but a config."""

from __future__ import annotations

from pathlib import Path

import pytest
from harness.plan_command import Write, writer


@pytest.fixture
def write(tmp_path: Path) -> Write:
    return writer(tmp_path)
