"""What can refuse a job before it starts: its data, the model, the server, its output folder.

What only the worker can see (the shapes of `peft.init_adapter`) is checked there, when the job is
opened and before anything is trained.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_flexft.config import ActivationPolicy, DatasetConfig, FinetuneJob, PeftConfig
from vllm_flexft.data.dataset import TrainingData
from vllm_flexft.data.order import BatchOrder
from vllm_flexft.data.preparer import DatasetPreparer, TokenizerSource
from vllm_flexft.graph.families import target_layers, target_names
from vllm_flexft.graph.job_memory import JobMemory
from vllm_flexft.graph.memory import adapter_parameters
from vllm_flexft.graph.ops import ModelShape
from vllm_flexft.graph.windows import backward_windows
from vllm_flexft.plan import Windows
from vllm_flexft.publish.adapter_files import check_init_adapter, read_adapter
from vllm_flexft.publish.checkpoint import latest_checkpoint, read_checkpoint
from vllm_flexft.publish.final import check_output_dir, foreign_files, write_job_file
from vllm_flexft.sched.prepared import Counters, PreparedJob
from vllm_flexft.sched.room import Limits
from vllm_flexft.wiring import supported_ranks

logger = logging.getLogger("vllm.flexft")

# Of the KV cache. A micro-batch needs all its blocks at once: it finds them beside steady requests
# only while it is small against the cache.
MICRO_BATCH_KV_SHARE = 0.25


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """What a job must fit into."""

    max_model_len: int
    kv_tokens: int  # that training can borrow of the KV cache when no request holds any
    max_lora_rank: int
    shape: ModelShape
    itemsize: int  # bytes of a number of the model
    activation_policy: ActivationPolicy
    memory_bytes: Callable[[], float]  # for all that a job allocates
    jobs_at_once: int  # that share `memory_gib`
    device: str  # as vLLM calls its type
    rank_was_given: bool = False  # by the user; else it is what the jobs named at start need

    @property
    def windows(self) -> Windows:
        return backward_windows(self.shape, self.device)

    def job_memory(self, job: FinetuneJob) -> JobMemory:
        return JobMemory.of(self.shape, job, self.itemsize, self.activation_policy, self.windows)

    def of_run(self, prepared: PreparedJob, *, max_rows: int, block_size: int) -> Limits:
        """What the job may take in training; `max_rows`: sequences with chunks in one batch."""
        memory_bytes = self.memory_bytes()
        lanes = self.job_memory(prepared.job).lanes_within(prepared.longest, memory_bytes)
        share = min(MICRO_BATCH_KV_SHARE, 0.5 / self.jobs_at_once)
        return Limits(
            windows=self.windows,
            lane_tokens=lanes.tokens,
            num_lanes=lanes.count,
            max_rows=max_rows,
            lowest_layer=prepared.lowest_layer,
            kv_blocks=int(self.kv_tokens // block_size * share),
            block_size=block_size,
            activation_policy=self.activation_policy,
            memory_bytes=memory_bytes,
            adapter_parameters=self._adapter_parameters(prepared.job.peft),
        )

    def _adapter_parameters(self, peft: PeftConfig) -> int:
        targets = target_names(peft.target_modules)
        layers = target_layers(peft.layers_to_transform, self.shape.num_layers)
        return adapter_parameters(self.shape, targets, layers, peft.r)


class Admission:
    """Turns accepted jobs into prepared ones.

    Args:
        model_config: vLLM's; names the tokenizer.
        reserved_names: served models of the user, which no job may shadow.
    """

    def __init__(
        self, model_config: Any, limits: EngineLimits, reserved_names: Collection[str]
    ) -> None:
        self._limits, self._reserved_names = limits, reserved_names
        self.preparer = DatasetPreparer(
            TokenizerSource(
                model_config.tokenizer,
                model_config.tokenizer_revision,
                model_config.trust_remote_code,
            )
        )

    def prepare(
        self,
        job_id: str,
        job: FinetuneJob,
        output_dir: Path,
        check: Callable[[], None] = lambda: None,
    ) -> PreparedJob:
        """Check the job, tokenise its data, find its resume point, write its job.yaml.

        `check` is called while data is tokenised; what it raises ends the preparation.
        Raises ValueError or OSError, with a message for the user, for a job that cannot run.
        """

        def load(dataset: DatasetConfig) -> TrainingData:
            limit = self._limits.max_model_len
            return self.preparer.load(dataset, max_model_len=limit, check=check)

        self._check_name(job.name)
        lowest_layer = self._check_peft(job.peft)
        check_output_dir(output_dir)
        train = load(job.dataset)
        validation = load(job.validation) if job.validation is not None else None
        training = job.training
        order = BatchOrder(
            len(train),
            training.train_batch_size,
            training.seed,
            job.dataset.shuffle,
            training.num_train_epochs,
            training.max_steps,
        )
        longest = self._longest(train, validation)
        self._check_memory(job, longest)
        prepared = PreparedJob(
            job_id=job_id,
            job=job,
            config_hash=job.config_hash(),
            output_dir=output_dir,
            train=train,
            order=order,
            validation=validation,
            longest=longest,
            lowest_layer=lowest_layer,
        )
        _find_resume_point(prepared)  # refuses the folder of another job
        _tell_of_foreign_files(job.name, output_dir)
        write_job_file(output_dir, job)
        return prepared

    def review(
        self, job: FinetuneJob, output_dir: Path, check: Callable[[], None] = lambda: None
    ) -> Sequence[str]:
        """Every mistake that shows without reading all of the data: a message each.

        `check` as for `prepare`.
        """

        def look_at(dataset: DatasetConfig) -> None:
            limit = self._limits.max_model_len
            self.preparer.check_first_rows(dataset, max_model_len=limit, check=check)

        looks: list[Callable[[], object]] = [
            lambda: self._check_name(job.name),
            lambda: self._check_peft(job.peft),
            lambda: check_output_dir(output_dir),
            lambda: look_at(job.dataset),
        ]
        if (validation := job.validation) is not None:
            looks.append(lambda: look_at(validation))
        mistakes: dict[str, None] = {}  # in order; dataset and validation may share one
        for look in looks:
            try:
                look()
            except (ValueError, OSError) as error:
                mistakes[str(error)] = None
        return tuple(mistakes)

    def _check_name(self, name: str) -> None:
        if name in self._reserved_names:
            raise ValueError(
                f"name: {name!r} is already used by a model of this server; choose another name"
            )

    def _check_peft(self, peft: PeftConfig) -> int:
        """The lowest layer that gets an adapter."""
        layers = target_layers(peft.layers_to_transform, self._limits.shape.num_layers)
        if peft.r > self._limits.max_lora_rank:
            enough = next(rank for rank in supported_ranks() if rank >= peft.r)
            raise ValueError(self._rank_message(peft.r, enough))
        if peft.init_adapter is not None:
            try:
                _, config = read_adapter(Path(peft.init_adapter))
            except ValueError as error:
                raise ValueError(f"peft.init_adapter: {error}") from None
            check_init_adapter(config, peft, peft.target_module_names, layers)
        return min(layers)

    def _rank_message(self, rank: int, enough: int) -> str:
        limit = self._limits.max_lora_rank
        if self._limits.rank_was_given:
            return (
                f"peft.r: {rank} is more than the --max-lora-rank {limit} that the server was "
                f"started with; lower peft.r, or start it with --max-lora-rank {enough}"
            )
        return (
            f"peft.r: {rank} is more than the --max-lora-rank {limit} that this server took, by "
            f"itself, for the jobs named at its start (16 at least); lower peft.r, name this job "
            f"at the start as well, or start the server with --max-lora-rank {enough}"
        )

    def _check_memory(self, job: FinetuneJob, longest: int) -> None:
        limits = self._limits
        try:
            limits.job_memory(job).check(longest, limits.memory_bytes())
        except ValueError as error:
            if limits.jobs_at_once == 1:
                raise
            raise ValueError(
                f"{error}; times {limits.jobs_at_once}: so many jobs at once share memory_gib"
            ) from None

    def _longest(self, *datasets: TrainingData | None) -> int:
        """Tokens of the longest sequence, which the KV cache must be able to hold."""
        longest = max(data.longest for data in datasets if data is not None)
        if longest > self._limits.kv_tokens:
            raise ValueError(
                f"dataset.max_length: a sequence of {longest} tokens does not fit the KV cache, "
                f"of which training can borrow {self._limits.kv_tokens} tokens; set it to "
                f"{self._limits.kv_tokens} or less, or give the server more KV-cache memory"
            )
        return longest


def _tell_of_foreign_files(name: str, output_dir: Path) -> None:
    foreign = foreign_files(output_dir)
    if foreign:
        more = f" and {len(foreign) - 5} more" if len(foreign) > 5 else ""
        logger.warning(
            "[%s] output_dir %s holds files of something else, which stay: %s%s",
            name, output_dir, ", ".join(foreign[:5]), more,
        )  # fmt: skip


def _find_resume_point(prepared: PreparedJob) -> None:
    checkpoint = latest_checkpoint(prepared.output_dir, prepared.config_hash)
    if checkpoint is None:
        return
    state = read_checkpoint(checkpoint, verify=False)
    prepared.resume_from, prepared.resume_step = checkpoint, state.step
    prepared.counters = Counters(**state.counters)
    prepared.log_history = state.log_history
    logger.info("[%s] resumes from %s", prepared.job.name, checkpoint)
