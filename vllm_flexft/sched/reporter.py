"""What a running job tells its user: metrics.jsonl, one log line a step, a closing summary."""

from __future__ import annotations

import logging
import time
from typing import Any

from vllm_flexft.obs.metrics import MetricsWriter, read_metrics
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
            log_history=prepared.log_history,
        )
        self._started = time.monotonic()
        self._steps_timed = 0
        logger.info(
            "[%s] %d steps of %d sequences; dataset: %s",
            prepared.job.name,
            prepared.order.total_steps,
            prepared.job.training.train_batch_size,
            prepared.train.report,
        )

    def log(self, record: StepRecord | EvalRecord) -> dict[str, Any] | None:
        """Write the record; returns the metrics of an optimizer step."""
        name = self._prepared.job.name
        if isinstance(record, EvalRecord):
            line: dict[str, Any] = {
                "step": record.step,
                "eval_loss": record.loss,
                "eval_mean_token_accuracy": record.accuracy,
            }
            self._metrics.log_validation(**line)
            logger.info(format_validation(name=name, **line))
            return None
        self._steps_timed += 1
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

    def sync(self) -> None:
        self._metrics.sync()

    def finish(self, end: EndRecord) -> None:
        self._metrics.close()
        name = self._prepared.job.name
        if end.error is not None:
            logger.error("[%s] failed: %s", name, end.error)
        elif end.cancelled:
            logger.info("[%s] cancelled", name)
        else:
            # From the file: a resumed run began in another process.
            lines = [line for line in read_metrics(self._metrics.path) if "loss" in line]
            if not lines:
                return  # the user removed it meanwhile
            first, last = lines[0], lines[-1]
            summary = RunSummary(
                name=name,
                served_as=name,
                adapter_dir=self._prepared.output_dir,
                steps=last["step"],
                first_loss=first["loss"],
                last_loss=last["loss"],
                num_input_tokens=last["num_input_tokens"],
                num_tokens=last["num_tokens"],
                wall_s=self._prepared.counters.train_seconds,
            )
            for line in format_summary(summary).splitlines():
                logger.info(line)
