"""Losses and gradient norms on their way from the device, and what is reported of them."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from vllm_flexft.plan import EvaluationLoss, MicroBatch, OptimizerStep, StepResult, Written
from vllm_flexft.train.stream import BackwardStream, Readback

# Lines of metrics.jsonl that a checkpoint repeats (about 40 KB): another process writes the file,
# and a crash may come before it has written the steps that the checkpoint holds.
LOG_HISTORY = 200


@dataclass(frozen=True, slots=True)
class _Awaited:
    """Of a micro-batch that is through: loss and hits; of an update: the gradient's norm."""

    of: MicroBatch | OptimizerStep
    numbers: Readback


class Results:
    """Of one job. On a CPU, or on one stream, all is there when it is asked for."""

    def __init__(self, job_id: str, stream: BackwardStream) -> None:
        self._job_id, self._stream = job_id, stream
        self._awaited: deque[_Awaited] = deque()  # in the order of the stream
        self._evaluated: list[EvaluationLoss] = []
        self._updated: list[StepResult] = []
        self._step_loss = 0.0  # of the optimizer step under way, mean over its targets
        self._step_started = time.monotonic()
        self.log_history: deque[dict[str, Any]] = deque(maxlen=LOG_HISTORY)

    @property
    def awaiting(self) -> bool:
        return bool(self._awaited)

    def expect(self, of: MicroBatch | OptimizerStep, *numbers: Tensor) -> None:
        """See `_Awaited`. Raises as `settle`."""
        self._awaited.append(_Awaited(of, self._stream.read(numbers)))
        self.settle(wait=False)

    def settle(self, *, wait: bool) -> None:
        """Take in what has come; `wait`: all that is expected.

        Raises FloatingPointError at what is not finite; the device has not applied that update.
        """
        while self._awaited and (wait or self._awaited[0].numbers.ready):
            done = self._awaited.popleft()
            number, *more = done.numbers.values()
            finite = abs(number) < float("inf")  # NaN compares false
            if isinstance(done.of, OptimizerStep):
                if not finite:
                    raise FloatingPointError(f"gradient norm is {number}")
                self._update(done.of, number)
                continue
            if not finite:
                raise FloatingPointError(f"loss is {number}")
            if done.of.train:
                self._step_loss += number * done.of.loss_scale
            else:
                self._evaluated.append(EvaluationLoss(done.of.id, number, int(more[0])))

    def report(self, *, opened: bool, written: tuple[Written, ...]) -> list[StepResult]:
        """What has come since the last report; a result holds one update at most. Raises as
        `settle`."""
        self.settle(wait=False)
        updated, self._updated = self._updated, []
        evaluated, self._evaluated = tuple(self._evaluated), []
        last = updated.pop() if updated else StepResult(self._job_id)
        return [*updated, replace(last, opened=opened, evaluated=evaluated, written=written)]

    def _update(self, step: OptimizerStep, norm: float) -> None:
        loss, now = self._step_loss, time.monotonic()
        self._updated.append(
            StepResult(self._job_id, updated_step=step.step, loss=loss, grad_norm=norm)
        )
        self.log_history.append(
            {
                "step": step.step + 1,
                "epoch": step.epoch,
                "loss": loss,
                "learning_rate": step.learning_rate,
                "grad_norm": norm,
                "num_tokens": step.num_tokens,
                "num_input_tokens": step.num_input_tokens,
                "tokens_per_second": step.step_input_tokens / (now - self._step_started),
                "time": time.time(),
            }
        )
        self._step_loss, self._step_started = 0.0, now
