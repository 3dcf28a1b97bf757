"""What a job's data makes of its plan: steps, tokens, time."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_flexft.config import FinetuneJob
from vllm_flexft.data.dataset import DataReport, TrainingData, check_first_rows
from vllm_flexft.data.files import SUFFIXES, DataError
from vllm_flexft.data.order import BatchOrder

READ_IN_FULL = 16 * 2**20  # bytes of a file: tokenised in some seconds


@dataclass(frozen=True, slots=True)
class DataPlan:
    """What the job trains on. `report` is None, and the numbers 0, where that was not counted."""

    why_not: str = ""
    report: DataReport | None = None
    steps: int = 0  # optimizer steps of the job
    tokens: float = 0.0  # in all of them

    def lines(self, tokens_per_second: float | None) -> list[str]:
        if self.report is None:
            return [f"data: not counted: {self.why_not}"]
        lines = [
            f"data: {self.report}",
            f"steps: {self.steps:,}, of {self.tokens:,.0f} tokens together",
        ]
        if tokens_per_second is not None:
            lines.append(f"expected duration when idle: {_time(self.tokens / tokens_per_second)}")
        return lines


def plan_data(job: FinetuneJob, model: str, max_model_len: int) -> DataPlan:
    """Read the job's data with the model's tokenizer, where that is cheap.

    Raises DataError for data that a server would refuse.
    """
    datasets = [job.dataset] + ([] if job.validation is None else [job.validation])
    for path in (Path(dataset.path) for dataset in datasets):
        if path.suffix.lower() not in SUFFIXES:
            return DataPlan(f"{path} is no file")
        if not path.is_file():
            raise DataError(f"{path}: no such file")
    tokenizer = _tokenizer(model)
    if tokenizer is None:
        return DataPlan(f"no tokenizer in {model}")
    for dataset in datasets:
        check_first_rows(dataset, tokenizer, max_model_len=max_model_len)
    if (size := Path(job.dataset.path).stat().st_size) > READ_IN_FULL:
        return DataPlan(f"{job.dataset.path} has {size / 2**20:,.0f} MiB")
    data = TrainingData.load(job.dataset, tokenizer, max_model_len=max_model_len)
    training = job.training
    order = BatchOrder(
        len(data),
        training.train_batch_size,
        training.seed,
        num_train_epochs=training.num_train_epochs,
        max_steps=training.max_steps,
    )
    steps = order.total_steps
    return DataPlan("", data.report, steps, order.epoch(steps) * data.report.tokens)


def _tokenizer(model: str) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError, KeyError, TypeError):  # a folder with a config alone, or the like
        return None


def _time(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
