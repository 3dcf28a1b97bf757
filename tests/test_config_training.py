"""The learning rate at every step is transformers.get_scheduler's."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import get_scheduler

from vllm_flexft.config import TrainingConfig


def reference(config: TrainingConfig, total_steps: int, warmup_steps: int) -> list[float]:
    """The learning rate that each of `total_steps` optimizer steps is made with."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=config.learning_rate)
    scheduler = get_scheduler(
        config.lr_scheduler_type,
        optimizer,
        num_warmup_steps=warmup_steps,
        num_training_steps=total_steps,
    )
    rates = []
    for _ in range(total_steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


schedules = st.sampled_from(["linear", "cosine", "constant", "constant_with_warmup"])


@given(
    name=schedules,
    total_steps=st.integers(1, 60),
    warmup_steps=st.integers(0, 80),
    learning_rate=st.floats(1e-7, 10),
)
@settings(derandomize=True, deadline=None)
def test_learning_rate_equals_transformers_for_warmup_steps(
    name, total_steps: int, warmup_steps: int, learning_rate: float
) -> None:
    config = TrainingConfig(
        lr_scheduler_type=name, warmup_steps=warmup_steps, learning_rate=learning_rate
    )
    ours = [config.learning_rate_at(step, total_steps) for step in range(total_steps)]
    assert ours == pytest.approx(reference(config, total_steps, warmup_steps), rel=1e-12, abs=0)


@given(name=schedules, total_steps=st.integers(1, 60), ratio=st.floats(0, 1))
@settings(derandomize=True, deadline=None)
def test_learning_rate_equals_transformers_for_warmup_ratio(
    name, total_steps: int, ratio: float
) -> None:
    config = TrainingConfig(lr_scheduler_type=name, warmup_ratio=ratio)
    ours = [config.learning_rate_at(step, total_steps) for step in range(total_steps)]
    warmup_steps = math.ceil(total_steps * ratio)
    assert ours == pytest.approx(reference(config, total_steps, warmup_steps), rel=1e-12, abs=0)
