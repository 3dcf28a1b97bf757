from collections.abc import Callable

import pytest
import torch

from vllm_flexft.config import PeftConfig
from vllm_flexft.publish.adapter_files import adapter_key
from vllm_flexft.publish.checkpoint import TrainState

HIDDEN, OUT, RANK = 32, 32, 4


@pytest.fixture
def peft() -> PeftConfig:
    return PeftConfig(r=RANK, lora_alpha=8, target_modules=("q_proj", "o_proj"))


@pytest.fixture
def make_state() -> Callable[[int], TrainState]:
    """A small state, different at every step, with every kind of content."""

    def make(step: int) -> TrainState:
        generator = torch.Generator().manual_seed(step)

        def matrices() -> dict[str, torch.Tensor]:
            shapes = {"A": (RANK, HIDDEN), "B": (OUT, RANK)}
            return {
                adapter_key(layer, module, ab): torch.randn(shapes[ab], generator=generator)
                for layer in (0, 1)
                for module in ("q_proj", "o_proj")
                for ab in "AB"
            }

        return TrainState(
            step=step,
            adapter=matrices(),
            optimizer={"exp_avg": matrices(), "exp_avg_sq": matrices()},
            counters={"best_eval_loss": 0.1 * step, "num_tokens": 2**53 + step, "evals": None},
            log_history=[{"step": step, "loss": 1.0 / 3.0}],
        )

    return make
