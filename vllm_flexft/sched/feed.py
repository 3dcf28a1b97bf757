"""The scheduler's link to disk: a thread that brings jobs in and carries records out.

It leases jobs from the store, reads and tokenises their data, and finds the point to resume from,
so that the engine's loop meets only jobs that are ready. Metrics, log lines and the store are
written here too. The scheduler's side of it (`take`, `report`, `is_cancelled`) never waits.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from vllm_flexft.data.dataset import TrainingData
from vllm_flexft.data.order import BatchOrder
from vllm_flexft.graph.families import target_layers
from vllm_flexft.jobs.owner import new_owner
from vllm_flexft.jobs.records import JobRecord
from vllm_flexft.jobs.states import JobStatus
from vllm_flexft.jobs.store import JobStore
from vllm_flexft.publish.checkpoint import latest_checkpoint, read_checkpoint
from vllm_flexft.publish.final import read_final, write_job_file
from vllm_flexft.sched.prepared import Counters, PreparedJob
from vllm_flexft.sched.progress import EndRecord, Record, WrittenRecord
from vllm_flexft.sched.reporter import Reporter
from vllm_flexft.wiring import CoServeConfig, job_store_path

logger = logging.getLogger("vllm.flexft")

POLL_S = 0.2
HEARTBEAT_S = 5.0


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """What a job must fit into."""

    max_model_len: int
    kv_tokens: int  # tokens that the KV cache holds
    max_lora_rank: int
    num_layers: int


class JobFeed(threading.Thread):
    def __init__(self, config: CoServeConfig, model_config: Any, limits: EngineLimits) -> None:
        super().__init__(name="flexft-feed", daemon=True)
        self.wake: Callable[[], None] = lambda: None
        self._config, self._model_config, self._limits = config, model_config, limits
        self._ready: queue.SimpleQueue[PreparedJob] = queue.SimpleQueue()
        self._outbox: queue.SimpleQueue[tuple[PreparedJob, Record]] = queue.SimpleQueue()
        self._cancelled: set[str] = set()
        self._stopping = threading.Event()
        self._tokenizer: Any = None
        self._reporter: Reporter | None = None
        self._busy = False  # a job is with the scheduler

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

    def is_cancelled(self, job_id: str) -> bool:
        return job_id in self._cancelled

    def stop(self) -> None:
        """Write what was reported and give an unfinished job back to the queue."""
        self._stopping.set()
        if self.is_alive():
            self.join(timeout=10.0)

    # ---- the thread

    def run(self) -> None:
        try:
            self._store = JobStore(job_store_path(self._config.options))
            self._owner = new_owner()
            self._submit_configured_jobs()
            heartbeat_at = time.monotonic()
            while not self._stopping.is_set():
                self._drain_outbox(timeout=POLL_S)
                if time.monotonic() >= heartbeat_at:
                    self._heartbeat()
                    heartbeat_at = time.monotonic() + HEARTBEAT_S
                if not self._busy:
                    self._lease_next()
            self._drain_outbox(timeout=0.0)
            self._release()
        except Exception:
            logger.exception("the finetuning queue failed; inference goes on without it")

    def _submit_configured_jobs(self) -> None:
        for entry in self._config.jobs:
            try:
                if entry.job is None:
                    self._store.refuse(entry.source, entry.source, entry.error or "")
                    continue  # logged at start, by the process that read the file
                job = entry.job.with_output_dir(self._config.options)
                self._store.submit(job, model=self._model_config.model)
            except ValueError as error:
                logger.error("Finetune job %s is refused: %s", entry.source, error)
                self._store.refuse(entry.source, entry.source, str(error))

    def _lease_next(self) -> None:
        for record in self._store.lease(self._owner, 1, model=self._model_config.model):
            try:
                prepared = self._prepare(record)
            except (ValueError, OSError) as error:
                logger.error("Finetune job %s is refused: %s", record.name, error)
                self._store.finish(record.id, JobStatus.FAILED, str(error))
            except Exception as error:
                logger.exception("Finetune job %s could not be prepared", record.name)
                self._store.finish(record.id, JobStatus.FAILED, f"{type(error).__name__}: {error}")
            else:
                if prepared is not None:
                    self._busy = True
                    self._ready.put(prepared)
                    self.wake()

    def _prepare(self, record: JobRecord) -> PreparedJob | None:
        """Everything that can refuse a job, before it starts. None: it was finished already."""
        job = record.job()
        output_dir = job.resolve_output_dir(self._config.options)
        config_hash = job.config_hash()
        if (final := read_final(output_dir)) is not None and final.config_hash == config_hash:
            self._store.add_version(record.id, job.name, str(final.path), final.step, final=True)
            self._store.finish(record.id, JobStatus.SUCCEEDED)
            logger.info("[%s] was finished before; its adapter is served", job.name)
            return None
        lowest_layer = min(target_layers(job.peft.layers_to_transform, self._limits.num_layers))
        if job.peft.r > self._limits.max_lora_rank:
            raise ValueError(
                f"peft.r: {job.peft.r} exceeds this server's highest LoRA rank "
                f"{self._limits.max_lora_rank}; start it with --max-lora-rank {job.peft.r}"
            )
        train = self._load(job.dataset)
        validation = self._load(job.validation) if job.validation is not None else None
        self._check_kv(train, validation)
        training = job.training
        order = BatchOrder(
            len(train),
            training.train_batch_size,
            training.seed,
            job.dataset.shuffle,
            training.num_train_epochs,
            training.max_steps,
        )
        prepared = PreparedJob(
            job_id=record.id,
            job=job,
            config_hash=config_hash,
            output_dir=output_dir,
            train=train,
            order=order,
            validation=validation,
            lowest_layer=lowest_layer,
        )
        write_job_file(output_dir, job)
        self._find_resume_point(prepared)
        self._reporter = Reporter(prepared)
        return prepared

    def _load(self, dataset: Any) -> TrainingData:
        if self._tokenizer is None:
            from transformers import AutoTokenizer

            self._tokenizer = AutoTokenizer.from_pretrained(
                self._model_config.tokenizer,
                revision=self._model_config.tokenizer_revision,
                trust_remote_code=self._model_config.trust_remote_code,
            )
        return TrainingData.load(dataset, self._tokenizer, max_model_len=self._limits.max_model_len)

    def _check_kv(self, *datasets: TrainingData | None) -> None:
        longest = max(
            max(len(data[i].token_ids) for i in range(len(data))) for data in datasets if data
        )
        if longest > 0.9 * self._limits.kv_tokens:
            raise ValueError(
                f"a sequence of {longest} tokens does not fit the KV cache of "
                f"{self._limits.kv_tokens} tokens beside inference; lower dataset.max_length or "
                "give the server more KV-cache memory"
            )

    def _find_resume_point(self, prepared: PreparedJob) -> None:
        checkpoint = latest_checkpoint(prepared.output_dir, prepared.config_hash)
        if checkpoint is None:
            return
        state = read_checkpoint(checkpoint)
        prepared.resume_from, prepared.resume_step = checkpoint, state.step
        prepared.counters = Counters(**state.counters)
        logger.info("[%s] resumes from %s", prepared.job.name, checkpoint)

    # ---- records

    def _drain_outbox(self, timeout: float) -> None:
        while True:
            try:
                prepared, record = (
                    self._outbox.get(timeout=timeout) if timeout else (self._outbox.get_nowait())
                )
            except queue.Empty:
                return
            timeout = 0.0
            try:
                self._record(prepared, record)
            except Exception:
                logger.exception("[%s] could not record %s", prepared.job.name, record)

    def _record(self, prepared: PreparedJob, record: Record) -> None:
        assert self._reporter is not None
        if isinstance(record, WrittenRecord):
            self._announce(prepared, record)
        elif isinstance(record, EndRecord):
            self._finish(prepared, record)
        else:
            metrics = self._reporter.log(record)
            if metrics is not None:
                self._store.progress(
                    prepared.job_id, metrics["step"], prepared.order.total_steps, metrics
                )

    def _announce(self, prepared: PreparedJob, record: WrittenRecord) -> None:
        """Every version has its own name: `name` for the final adapter, else `name@step-N`."""
        written, name = record.written, prepared.job.name
        if written.warning is not None:
            logger.warning("[%s] %s", name, written.warning)
            self._store.add_event(prepared.job_id, "warning", written.warning)
        if written.path is not None:
            served = name if written.final else f"{name}@step-{written.step}"
            self._store.add_version(
                prepared.job_id, served, written.path, written.step, written.final
            )
        if written.pruned:
            self._store.retire_versions(written.pruned)

    def _finish(self, prepared: PreparedJob, record: EndRecord) -> None:
        assert self._reporter is not None
        self._busy = False
        status = JobStatus.FAILED if record.error else JobStatus.SUCCEEDED
        if record.cancelled:
            status = JobStatus.CANCELLED
        self._reporter.finish(record)
        self._store.finish(prepared.job_id, status, record.error)
        self._reporter = None

    def _heartbeat(self) -> None:
        for job_id in self._store.heartbeat(self._owner):
            if self._store.cancel_requested(job_id):
                self._cancelled.add(job_id)

    def _release(self) -> None:
        for job_id in self._store.heartbeat(self._owner):
            self._store.release(job_id, self._owner)
