"""Turns step results into what a job reports: losses, evaluations, checkpoints, failure."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass
from typing import Any

from vllm_flexft.plan import StepResult, Written
from vllm_flexft.sched.prepared import Counters

# Lines of metrics.jsonl that a checkpoint repeats: a crash may come before they are written.
RECENT_EVALUATIONS = 8


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One optimizer step that the worker applied."""

    step: int  # 1-based, as in metrics.jsonl and checkpoint names
    epoch: float
    loss: float
    learning_rate: float
    grad_norm: float
    num_tokens: int
    num_input_tokens: int
    step_input_tokens: int
    seconds: float


@dataclass(frozen=True, slots=True)
class EvalRecord:
    step: int
    loss: float
    accuracy: float


@dataclass(frozen=True, slots=True)
class WrittenRecord:
    written: Written


@dataclass(frozen=True, slots=True)
class EndRecord:
    """The job is over: with an error, cancelled, or (neither) with its adapter published."""

    error: str | None = None
    cancelled: bool = False


Record = StepRecord | EvalRecord | WrittenRecord | EndRecord


@dataclass(slots=True)
class _PlannedStep:
    epoch: float
    learning_rate: float
    num_tokens: int
    num_input_tokens: int
    step_input_tokens: int


@dataclass(slots=True)
class _Evaluation:
    step: int
    targets: int
    pending: set[int]
    loss_sum: float = 0.0
    num_correct: int = 0


class RunProgress:
    """Matches results to what was planned, by micro-batch id and optimizer step."""

    def __init__(self, counters: Counters, patience: int | None) -> None:
        self._counters, self._patience = counters, patience
        self._steps: dict[int, _PlannedStep] = {}
        self._evaluation: _Evaluation | None = None
        self._last_update = time.monotonic()
        self.recent_evaluations: deque[dict[str, Any]] = deque(maxlen=RECENT_EVALUATIONS)

    @property
    def out_of_patience(self) -> bool:
        """Early stopping. From the counters, so that a resume knows it too."""
        return self._patience is not None and self._counters.evals_without_gain >= self._patience

    @property
    def evaluating(self) -> bool:
        """Results of an evaluation are still awaited: early stopping depends on them."""
        return self._evaluation is not None

    def step_planned(
        self, step: int, epoch: float, learning_rate: float, input_tokens: int
    ) -> None:
        self._steps[step] = _PlannedStep(
            epoch=epoch,
            learning_rate=learning_rate,
            num_tokens=self._counters.num_tokens,
            num_input_tokens=self._counters.num_input_tokens,
            step_input_tokens=input_tokens,
        )

    def evaluation_planned(self, step: int, targets: int) -> None:
        self._evaluation = _Evaluation(step, targets, set())

    def eval_batch_planned(self, batch_id: int) -> None:
        assert self._evaluation is not None
        self._evaluation.pending.add(batch_id)

    def on_result(self, result: StepResult, all_evaluation_planned: bool) -> list[Record]:
        records: list[Record] = []
        if self._evaluation is not None:
            for part in result.evaluated:
                self._evaluation.pending.discard(part.micro_batch)
                self._evaluation.loss_sum += part.loss_sum
                self._evaluation.num_correct += part.num_correct
        if result.updated_step is not None:
            assert result.loss is not None
            assert result.grad_norm is not None
            records.append(self._step_record(result.updated_step, result.loss, result.grad_norm))
        if (evaluation := self._evaluation) and all_evaluation_planned and not evaluation.pending:
            records.append(self._eval_record(evaluation))
            self._evaluation = None
        records.extend(WrittenRecord(written) for written in result.written)
        return records

    def _step_record(self, step: int, loss: float, grad_norm: float) -> StepRecord:
        planned, now = self._steps.pop(step), time.monotonic()
        seconds, self._last_update = now - self._last_update, now
        self._counters.train_seconds += seconds
        return StepRecord(
            step=step + 1,
            epoch=planned.epoch,
            loss=loss,
            learning_rate=planned.learning_rate,
            grad_norm=grad_norm,
            num_tokens=planned.num_tokens,
            num_input_tokens=planned.num_input_tokens,
            step_input_tokens=planned.step_input_tokens,
            seconds=seconds,
        )

    def _eval_record(self, evaluation: _Evaluation) -> EvalRecord:
        loss = evaluation.loss_sum / evaluation.targets
        best = self._counters.best_eval_loss
        if best is None or loss < best:
            self._counters.best_eval_loss, self._counters.evals_without_gain = loss, 0
        else:
            self._counters.evals_without_gain += 1
        accuracy = evaluation.num_correct / evaluation.targets
        self.recent_evaluations.append(
            {
                "step": evaluation.step,
                "eval_loss": loss,
                "eval_mean_token_accuracy": accuracy,
                "time": time.time(),
            }
        )
        return EvalRecord(evaluation.step, loss, accuracy)
