"""A job that this engine leased, and what is told of it: in the store, the log, metrics.jsonl."""

from __future__ import annotations

import logging

from vllm_flexft.jobs.records import LeaseLostError
from vllm_flexft.jobs.states import JobStatus
from vllm_flexft.jobs.store import JobStore
from vllm_flexft.sched.prepared import PreparedJob
from vllm_flexft.sched.progress import EndRecord, Record, WrittenRecord
from vllm_flexft.sched.reporter import Reporter
from vllm_flexft.sched.retirement import Retirement

logger = logging.getLogger("vllm.flexft")


class LeasedJob:
    """From the moment at which the job is ready until its end is told. For the feed's thread."""

    def __init__(
        self, prepared: PreparedJob, store: JobStore, retirement: Retirement, owner: str
    ) -> None:
        self.prepared, self._store, self._retirement = prepared, store, retirement
        self._owner = owner
        self.ending: EndRecord | None = None
        self.lease_lost = False
        self._reporter = Reporter(prepared)

    def record(self, record: Record) -> None:
        """Raises LeaseLostError when another engine has the job."""
        if isinstance(record, EndRecord):
            self.ending = record
        elif self.lease_lost:
            return  # another engine writes these files now
        elif isinstance(record, WrittenRecord):
            self._announce(record)
        else:
            metrics, order = self._reporter.log(record), self.prepared.order
            if metrics is not None:
                order.draw_after(record.step)
                self._store.progress(
                    self.prepared.job_id,
                    metrics["step"],
                    order.total_steps,
                    metrics,
                    owner=self._owner,
                )

    def finish(self) -> None:
        assert self.ending is not None
        self._reporter.finish(self.ending)
        status = JobStatus.FAILED if self.ending.error else JobStatus.SUCCEEDED
        if self.ending.cancelled:
            status = JobStatus.CANCELLED
        if not self.lease_lost:  # else its state is another engine's to tell
            end_job(self._store, self.prepared.job_id, status, self.ending.error, self._owner)

    def _announce(self, record: WrittenRecord) -> None:
        """Every version has its own name: `name` for the final adapter, else `name@step-N`."""
        written, prepared = record.written, self.prepared
        name = prepared.job.name
        if written.warning is not None:
            logger.warning("[%s] %s", name, written.warning)
            self._store.add_event(prepared.job_id, "warning", written.warning)
        if written.path is not None:
            self._reporter.sync()
            served = name if written.final else f"{name}@step-{written.step}"
            self._store.add_version(
                prepared.job_id, served, written.path, written.step, written.final
            )
        limit = prepared.job.training.save_total_limit
        self._retirement.retire(self._store, prepared.output_dir, limit)


def end_job(store: JobStore, job_id: str, status: JobStatus, error: str | None, owner: str) -> None:
    try:
        store.finish(job_id, status, error, owner=owner)
    except LeaseLostError as lost:
        logger.error("%s", lost)
