"""What a running job tells its user: metrics.jsonl, one log line a step, a closing summary."""

from __future__ import annotations

import logging
import time
from typing import Any

from vllm_flexft.obs.metrics import MetricsWriter
from vllm_flexft.obs.progress import (
    RunSummary,
    eta_s,
    format_step,
    format_summary,
    format_validation,
)
from vllm_flexft.sched.prepared import PreparedJob
from vllm_flexft.sched.progress import EndRecord, EvalRecord, StepRecord

logger = logging.getLogger("vllm.flexft")


class Reporter:
    def __init__(self, prepared: PreparedJob) -> None:
        self._prepared = prepared
        self._metrics = MetricsWriter(
            prepared.output_dir,
            prepared.resume_step,
            report_to=prepared.job.report_to,
            run_name=prepared.job.name,
        )
        self._started = time.monotonic()
        self._steps_timed = 0
        self._first_loss: float | None = None
        self._last: StepRecord | None = None
        logger.info(
            "[%s] %d steps of %d sequences; %s",
            prepared.job.name,
            prepared.order.total_steps,
            prepared.job.training.train_batch_size,
            prepared.train.report,
        )

    def log(self, record: StepRecord | EvalRecord) -> dict[str, Any] | None:
        """Write the record; returns the metrics of an optimizer step."""
        name = self._prepared.job.name
        if isinstance(record, EvalRecord):
            line = {
                "step": record.step,
                "eval_loss": record.loss,
                "eval_mean_token_accuracy": record.accuracy,
            }
            self._metrics.log_validation(**line)
            logger.info(format_validation(name=name, **line))
            return None
        self._steps_timed += 1
        self._first_loss = record.loss if self._first_loss is None else self._first_loss
        self._last = record
        pace = record.step_input_tokens / record.seconds if record.seconds > 0 else 0.0
        logger.info(
            format_step(
                name=name,
                step=record.step,
                total_steps=self._prepared.order.total_steps,
                loss=record.loss,
                learning_rate=record.learning_rate,
                grad_norm=record.grad_norm,
                tokens_per_second=pace,
                eta_s=eta_s(
                    step=record.step,
                    total_steps=self._prepared.order.total_steps,
                    steps_timed=self._steps_timed,
                    elapsed_s=time.monotonic() - self._started,
                ),
            )
        )
        return self._metrics.log_step(
            step=record.step,
            epoch=record.epoch,
            loss=record.loss,
            learning_rate=record.learning_rate,
            grad_norm=record.grad_norm,
            num_tokens=record.num_tokens,
            num_input_tokens=record.num_input_tokens,
            tokens_per_second=pace,
        )

    def finish(self, end: EndRecord) -> None:
        self._metrics.close()
        name, last = self._prepared.job.name, self._last
        if end.error is not None:
            logger.error("[%s] failed: %s", name, end.error)
        elif end.cancelled:
            logger.info("[%s] cancelled", name)
        elif last is not None and self._first_loss is not None:
            summary = RunSummary(
                name=name,
                served_as=name,
                adapter_dir=self._prepared.output_dir,
                steps=last.step,
                first_loss=self._first_loss,
                last_loss=last.loss,
                num_input_tokens=last.num_input_tokens,
                num_tokens=last.num_tokens,
                wall_s=self._prepared.counters.train_seconds,
            )
            for line in format_summary(summary).splitlines():
                logger.info(line)
