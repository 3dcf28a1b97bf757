"""Engines of the gradient tests, one a model and dtype, and the record of what they measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from harness.gradients import GradientBench
from make_model import make_model

# Together they have grouped, multi-head and multi-query attention, tied and untied embeddings,
# heads that are wider than hidden_size / num_heads, and a sliding window that sequences outgrow.
# Three layers: adapters can sit on the lowest, on a middle and on the upper ones only.
MODELS: dict[str, dict[str, Any]] = {
    "llama": dict(num_key_value_heads=2),
    "qwen2": dict(num_key_value_heads=4, tie_word_embeddings=True),
    "qwen3": dict(num_key_value_heads=1, hidden_size=96),
    "mistral": dict(num_key_value_heads=2, sliding_window=48),
}
KV_BLOCKS = 160  # 20480 tokens: more than two full lanes and the requests among them need

Bench = Callable[..., GradientBench]


@pytest.fixture(scope="session")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """(family, dtype) -> its engine, loaded at its first use."""
    made: dict[tuple[str, str], GradientBench] = {}

    def get(family: str, dtype: str = "float32") -> GradientBench:
        if (family, dtype) not in made:
            work = tmp_path_factory.mktemp(f"{family}-{dtype}")
            model = make_model(
                work / "model", arch=family, dtype=dtype, num_hidden_layers=3, **MODELS[family]
            )
            made[family, dtype] = GradientBench(
                model, work, dtype=dtype, num_gpu_blocks_override=KV_BLOCKS
            )
        return made[family, dtype]

    return get


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
