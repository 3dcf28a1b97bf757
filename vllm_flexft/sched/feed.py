"""The scheduler's link to disk: a thread that brings jobs in and carries records out.

It leases jobs from the store, reads and tokenises their data, and finds the point to resume from,
so that the engine's loop meets only jobs that are ready. Metrics, log lines and the store are
written here too. The scheduler's side of it (`take`, `report`, `is_cancelled`) never waits.
"""

from __future__ import annotations

import logging
import queue
import sqlite3
import threading
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from vllm_flexft.jobs.owner import new_owner
from vllm_flexft.jobs.records import JobRecord, LeaseLostError
from vllm_flexft.jobs.states import JobStatus
from vllm_flexft.jobs.store import JobStore
from vllm_flexft.obs.metrics import METRICS_FILE, restore
from vllm_flexft.publish.checkpoint import read_checkpoint, sound_checkpoints, surplus
from vllm_flexft.publish.final import read_final
from vllm_flexft.publish.manifest import CheckpointError
from vllm_flexft.sched.admission import Admission, EngineLimits
from vllm_flexft.sched.intake import look_over, submit_named
from vllm_flexft.sched.latency_file import LatencyFile
from vllm_flexft.sched.lease import LeaseKeeper
from vllm_flexft.sched.leased_job import LeasedJob, end_job
from vllm_flexft.sched.prepared import PreparedJob
from vllm_flexft.sched.progress import Record, WrittenRecord
from vllm_flexft.sched.retirement import Retirement
from vllm_flexft.wiring import CoServeConfig, job_store_path

logger = logging.getLogger("vllm.flexft")

LatencyState = Mapping[str, Any]

POLL_S = 0.2
CANCEL_POLL_S = 0.5  # a user who cancels is watching
RETRY_S = 2.0  # after the store could not be read or written
MAX_RETRY_S = 60.0  # where it cannot be opened: a full or a foreign disk
KEEP_PREPARER_S = 60.0  # jobs often come in a row


class _NotWantedError(Exception):
    """The job that is being prepared was cancelled or taken over, or the engine stops."""


class JobFeed(threading.Thread):
    def __init__(self, config: CoServeConfig, model_config: Any, limits: EngineLimits) -> None:
        super().__init__(name="flexft-feed", daemon=True)
        self.wake: Callable[[], None] = lambda: None
        self._config, self._model_config = config, model_config
        self._admission = Admission(model_config, limits, config.reserved_names)
        self._ready: queue.SimpleQueue[PreparedJob] = queue.SimpleQueue()
        # None only wakes the thread
        self._outbox: queue.SimpleQueue[tuple[PreparedJob, Record] | None] = queue.SimpleQueue()
        self._step_times: queue.SimpleQueue[tuple[LatencyFile, LatencyState]] = queue.SimpleQueue()
        self._cancelled: set[str] = set()
        self._stopping = threading.Event()
        self._jobs: dict[str, LeasedJob] = {}  # that are with the scheduler
        self.retirement = Retirement()
        self._next_cancel_poll = 0.0
        self._unsettled = False  # a job may be leased that never reached the scheduler
        self.named_jobs_are_in = threading.Event()
        self.failure: str | None = None  # why this thread ended before it was told to

    # ---- the scheduler's side

    def has_ready(self) -> bool:
        return not self._ready.empty()

    def take(self) -> PreparedJob | None:
        try:
            return self._ready.get_nowait()
        except queue.Empty:
            return None

    def report(self, prepared: PreparedJob, record: Record) -> None:
        self._outbox.put((prepared, record))

    def save(self, file: LatencyFile, state: LatencyState) -> None:
        """Have step times written: the engine's loop must not wait for a disk."""
        self._step_times.put((file, state))

    def is_cancelled(self, job_id: str) -> bool:
        return job_id in self._cancelled

    def look(self) -> None:
        """There is something new in the store: do not wait for the next poll."""
        self._outbox.put(None)

    def stop(self) -> None:
        """Write what was reported and give an unfinished job back to the queue."""
        self._stopping.set()
        self.look()
        if self.is_alive():
            self.join(timeout=10.0)

    # ---- the thread

    def run(self) -> None:
        try:
            if self._open_store():
                self._serve()
        except BaseException as error:
            self.failure = f"{type(error).__name__}: {error}"
            logger.exception("the finetuning queue has stopped; inference goes on without it")
        finally:
            self._admission.preparer.close()

    def _open_store(self) -> bool:
        """Also takes in the jobs named at start. False when the engine stops first.

        Raises ValueError for a file that is no job store: waiting would not mend it.
        """
        path, retry_s = job_store_path(self._config.options), RETRY_S
        while not self._stopping.is_set():
            try:
                self._store = JobStore(path)
                self._owner = new_owner()
                self._named = submit_named(self._config, self._store, self._model_config.model)
            except (sqlite3.Error, OSError) as error:
                logger.error(
                    "the finetuning queue %s cannot be opened: %s; trying again in %.0f s",
                    path, error, retry_s,
                )  # fmt: skip
                self._stopping.wait(retry_s)
                retry_s = min(2 * retry_s, MAX_RETRY_S)
            else:
                self.named_jobs_are_in.set()
                return True
        return False

    def _serve(self) -> None:
        self._lease = LeaseKeeper(self._store, self._owner)
        self._lease.start()
        self._look_over_named_jobs()
        while not self._stopping.is_set():
            try:
                self._tend_jobs(POLL_S)
                if len(self._jobs) < self._config.options.max_jobs_at_once:
                    self._lease_next()
                self._admission.preparer.close_if_unused(KEEP_PREPARER_S)
            except Exception:  # a full disk, a locked file: it may pass
                logger.exception("the finetuning queue cannot be read or written; trying again")
                self._unsettled = True
                self._stopping.wait(RETRY_S)
        try:
            self._lease.stop()
            self._drain_outbox(timeout=0.0)
            self._finish_when_tidy()
            self._release()
        except Exception:
            logger.exception("the finetuning queue could not be left in order")

    def _tend_jobs(self, timeout: float) -> None:
        """What the jobs in training ask for, after at most `timeout` seconds without a record."""
        self._drain_outbox(timeout)
        while not self._step_times.empty():
            file, state = self._step_times.get_nowait()
            file.save(state)
        self._look_for_lost_lease()
        self.retirement.delete_due()
        if self.retirement.awaits_look:
            self.wake()  # an idle engine looks at nothing by itself
        self._finish_when_tidy()
        if time.monotonic() >= self._next_cancel_poll:
            self._next_cancel_poll = time.monotonic() + CANCEL_POLL_S
            self._look_for_cancellation()

    def _look_over_named_jobs(self) -> None:
        def check() -> None:
            if self._stopping.is_set():
                raise _NotWantedError

        model = self._model_config.model
        try:
            look_over(self._named, self._config, self._store, model, self._admission, check)
        except _NotWantedError:
            pass
        except Exception:  # each is checked again when its turn comes
            logger.exception("the jobs named at start could not be looked over")

    def _lease_next(self) -> None:
        if self._unsettled:
            self._release(keep=self._jobs)
            self._unsettled = False
        for record in self._store.lease(self._owner, 1, model=self._model_config.model):
            self._lease.beat()
            try:
                prepared = self._prepare(record)
                if prepared is not None:
                    self._jobs[record.id] = LeasedJob(
                        prepared, self._store, self.retirement, self._owner
                    )
            except _NotWantedError:
                if not self._stopping.is_set():  # else it goes back to the queue
                    self._end(record.id, JobStatus.CANCELLED)
            except sqlite3.Error:
                raise  # no fault of the job's
            except (ValueError, OSError, CheckpointError) as error:
                logger.error("Finetune job %s is refused: %s", record.name, error)
                self._end(record.id, JobStatus.FAILED, str(error))
            except Exception as error:
                logger.exception("Finetune job %s could not be prepared", record.name)
                self._end(record.id, JobStatus.FAILED, f"{type(error).__name__}: {error}")
            else:
                if prepared is not None:
                    self._cancelled.discard(record.id)
                    self._ready.put(prepared)
                    self.wake()

    def _prepare(self, record: JobRecord) -> PreparedJob | None:
        """None: it was finished already. Raises ValueError or OSError to refuse it."""
        job = record.job()
        output_dir = job.resolve_output_dir(self._config.options)
        final = read_final(output_dir)
        self._announce_found(record, output_dir)
        if final is not None:
            if final.config_hash == job.config_hash():
                self._store.add_version(
                    record.id, job.name, str(final.path), final.step, final=True
                )
                self._end(record.id, JobStatus.SUCCEEDED)
                logger.info("[%s] was finished before; its adapter is served", job.name)
                return None
            raise ValueError(
                f"output_dir: {output_dir} holds the adapter of a job of another configuration; "
                "choose another output_dir, or move that adapter away"
            )
        next_look = 0.0

        def check() -> None:
            nonlocal next_look
            if self._stopping.is_set() or not self._lease.holds(record.id):
                raise _NotWantedError
            if time.monotonic() >= next_look:
                next_look = time.monotonic() + CANCEL_POLL_S
                if self._store.cancel_requested(record.id):
                    raise _NotWantedError
            self._tend_jobs(0.0)

        return self._admission.prepare(record.id, job, output_dir, check)

    def _announce_found(self, record: JobRecord, output_dir: Path) -> None:
        """Tell of checkpoints in the folder what a crash may have kept from being told."""
        gone = [v.path for v in self._store.versions() if v.job_id == record.id and not v.retired]
        self._store.retire_versions(path for path in gone if not Path(path).is_dir())
        found = sound_checkpoints(output_dir, record.job().config_hash())
        limit = record.job().training.save_total_limit
        going = set(surplus(output_dir, limit))
        for step, path in found:
            if path in going:
                continue
            name = f"{record.name}@step-{step}"
            self._store.add_version(record.id, name, str(path), step, final=False)
        if found:
            step, path = found[-1]
            restore(
                output_dir / METRICS_FILE, step, read_checkpoint(path, verify=False).log_history
            )
        self.retirement.retire(self._store, output_dir, limit)

    # ---- records

    def _drain_outbox(self, timeout: float) -> None:
        while True:
            try:
                told = self._outbox.get(timeout=timeout) if timeout else self._outbox.get_nowait()
            except queue.Empty:
                return
            timeout = 0.0
            if told is None:
                continue
            prepared, record = told
            try:
                if (job := self._jobs.get(prepared.job_id)) is not None:
                    try:
                        job.record(record)
                    except LeaseLostError:
                        self._lose(job)
            except sqlite3.Error:
                if isinstance(record, WrittenRecord):
                    self._outbox.put((prepared, record))  # once more: it would never be served
                raise
            except Exception:
                logger.exception("[%s] could not record %s", prepared.job.name, record)

    def _finish_when_tidy(self) -> None:
        """A job has ended when its folder is as it will stay: without surplus checkpoints."""
        ended = [job for job in self._jobs.values() if job.ending is not None]
        for job in ended:
            if self._stopping.is_set() or self.retirement.settled(job.prepared.output_dir):
                self.retirement.delete_due()
                job.finish()
                del self._jobs[job.prepared.job_id]

    def _end(self, job_id: str, status: JobStatus, error: str | None = None) -> None:
        end_job(self._store, job_id, status, error, self._owner)

    def _look_for_lost_lease(self) -> None:
        """This process was asleep, or cut off from the store, for longer than a lease lasts."""
        for job_id, job in self._jobs.items():
            if not (job.lease_lost or self._lease.holds(job_id)):
                self._lose(job)

    def _lose(self, job: LeasedJob) -> None:
        logger.error("Finetune job %s was taken over by another engine", job.prepared.job_id)
        job.lease_lost = True
        self._cancelled.add(job.prepared.job_id)

    def _look_for_cancellation(self) -> None:
        for job_id in self._jobs:
            if self._store.cancel_requested(job_id):
                self._cancelled.add(job_id)

    def _release(self, keep: Collection[str] = ()) -> None:
        for job_id in self._store.heartbeat(self._owner):
            if job_id not in keep:
                self._store.release(job_id, self._owner)
