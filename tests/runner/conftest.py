"""The engines that tests of this folder share."""

from __future__ import annotations

import pytest
from harness.gradients import Benches


@pytest.fixture(scope="session")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Benches:
    """(family, dtype) -> its engine, loaded at its first use."""
    return Benches(tmp_path_factory)
