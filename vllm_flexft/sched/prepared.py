"""A job that is ready to train: validated, tokenised, and placed at its resume point."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm_flexft.config import FinetuneJob
from vllm_flexft.data.dataset import TrainingData
from vllm_flexft.data.order import BatchOrder


@dataclass(slots=True)
class Counters:
    """Cumulative numbers that a checkpoint carries, beside the step."""

    num_tokens: int = 0  # supervised
    num_input_tokens: int = 0
    best_eval_loss: float | None = None
    evals_without_gain: int = 0
    train_seconds: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__slots__}


@dataclass(slots=True)
class PreparedJob:
    job_id: str
    job: FinetuneJob
    config_hash: str
    output_dir: Path
    train: TrainingData
    order: BatchOrder
    validation: TrainingData | None
    longest: int  # tokens of the longest sequence, validation included
    lowest_layer: int  # that carries an adapter
    resume_from: Path | None = None
    resume_step: int = 0
    counters: Counters = field(default_factory=Counters)
    log_history: Sequence[Mapping[str, Any]] = ()  # lines of metrics.jsonl up to resume_step
