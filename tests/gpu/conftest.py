"""What a GPU has to confirm; `python -m benchmarks.gpu --only checks` runs it all.

Without a GPU the tests are skipped. With VLLM_FLEXFT_GPU_TESTS_ON_CPU=1 they run on CPU as far as
they can, to show that they would run.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

ON_GPU = torch.cuda.is_available()
ON_CPU = not ON_GPU and os.environ.get("VLLM_FLEXFT_GPU_TESTS_ON_CPU") == "1"
# Heads of 64: the least that all of vLLM's CUDA attention backends take.
MODEL = dict(
    num_hidden_layers=3, hidden_size=256, num_attention_heads=4, num_key_value_heads=2, head_dim=64
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent == Path(__file__).parent:
            item.add_marker(pytest.mark.gpu)
            if not (ON_GPU or ON_CPU):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture
def on_gpu() -> bool:
    return ON_GPU


@pytest.fixture
def engine_options() -> dict[str, Any]:
    """Of `CoServingEngine`: compiled, with CUDA graphs. Several engines share the GPU, so vLLM is
    not to measure its memory."""
    if not ON_GPU:
        return {}
    return {
        "enforce_eager": False,
        "options": {"experimental_cuda": True, "memory_gib": 1},
        "gpu_memory_utilization": 0.1,
        "kv_cache_memory_bytes": 2**28,
    }


@pytest.fixture
def make(tmp_path: Path) -> Any:
    """dtype -> folder of a small Llama."""
    from make_model import make_model

    return lambda dtype: make_model(tmp_path / "model", arch="llama", dtype=dtype, **MODEL)
