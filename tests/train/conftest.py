"""The engines that tests of this folder share, and the record of what was measured."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from harness.gradients import Benches


@pytest.fixture(scope="session")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Benches:
    """(family, dtype) -> its engine, loaded at its first use."""
    return Benches(tmp_path_factory)


class Worst:
    """Largest error by what was measured."""

    def __init__(self) -> None:
        self.errors: dict[str, float] = {}

    def see(self, what: str, error: float) -> None:
        self.errors[what] = max(error, self.errors.get(what, 0.0))


@pytest.fixture
def worst() -> Iterator[Worst]:
    """Prints at the end of the test what it saw; `pytest -rP` shows it."""
    seen = Worst()
    yield seen
    for what, error in seen.errors.items():
        print(f"max relative error, {what}: {error:.2e}")
