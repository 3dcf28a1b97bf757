"""How the request to co-serve travels from the command line, or `LLM(...)`, to every process.

It travels in vLLM's own `additional_config`, as plain JSON under four keys, since vLLM hashes that
dictionary and hands it to API servers, engine core and workers alike:

- `co_finetune`: a list of `{"source": path or "inline", "job": {...}}`, or `"error": "..."` in
  place of `"job"` for a job that was refused;
- `co_finetune_config`: the server-wide options, checked;
- `co_finetune_reserved_names`: model names in use at start, which no job may take;
- `co_finetune_rank_was_given`: whether the user set `--max-lora-rank`.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import psutil

from vllm_flexft.config import FinetuneJob, JobError, ServerOptions

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = logging.getLogger("vllm.flexft")

JOBS_KEY = "co_finetune"
OPTIONS_KEY = "co_finetune_config"
RESERVED_NAMES_KEY = "co_finetune_reserved_names"
RANK_GIVEN_KEY = "co_finetune_rank_was_given"

# vLLM numbers adapters that it loads itself from 1 upwards, in each API server on its own. Ours
# need numbers that all API servers agree on: this base plus the version's row in the job store.
# Numbers must stay below 2^31: model runner V2 keeps them as int32.
SERVED_LORA_ID_BASE = 1 << 24
TRAINING_LORA_ID_BASE = 1 << 30

# For training without `memory_gib`: of the host memory that is free, or of a GPU's. An eighth of an
# H200's is 17 GiB; Llama-3.1-8B needs 12 to keep all that its backward reads of 4,096 tokens.
FREE_MEMORY_SHARE = 0.25
DEVICE_MEMORY_SHARE = 0.125


@dataclass(frozen=True)
class JobEntry:
    """A job named at start: `source` is its file or "inline"; either `job` or `error` is set."""

    source: str
    job: FinetuneJob | None = None
    error: str | None = None  # a line for every mistake
    name: str | None = None  # the job's, where it could be read

    @property
    def label(self) -> str:
        """For messages about a job that is refused."""
        return f"{self.name} (inline)" if self.source == "inline" and self.name else self.source


@dataclass(frozen=True)
class CoServeConfig:
    """What every process of a co-serving engine knows about finetuning.

    Args:
        jobs: in the order in which they were named.
        options: server-wide options.
        serving_max_loras: the user's `max_loras`: adapters that one batch of requests may use.
        num_training_slots: LoRA slots beyond those, private to training.
        reserved_names: model names that no job may be served under.
    """

    jobs: tuple[JobEntry, ...]
    options: ServerOptions
    serving_max_loras: int
    num_training_slots: int
    reserved_names: frozenset[str]
    rank_was_given: bool = False  # --max-lora-rank, by the user

    @classmethod
    def from_vllm_config(cls, vllm_config: VllmConfig) -> CoServeConfig | None:
        """Read what `normalise` wrote; None for an engine that does not co-serve."""
        carried = vllm_config.additional_config
        if not isinstance(carried, Mapping) or not requested(carried):
            return None
        options = read_options(carried)
        lora_config = vllm_config.lora_config
        assert lora_config is not None, "create_engine_config enables LoRA for a co-serving engine"
        return cls(
            jobs=tuple(_read_entry(entry) for entry in carried[JOBS_KEY]),
            options=options,
            serving_max_loras=lora_config.max_loras - options.max_jobs_at_once,
            num_training_slots=options.max_jobs_at_once,
            reserved_names=frozenset(carried[RESERVED_NAMES_KEY]),
            rank_was_given=bool(carried.get(RANK_GIVEN_KEY)),
        )


def base_model(vllm_config: VllmConfig) -> str:
    """The `model` under which this server's jobs stand in the job store."""
    return vllm_config.model_config.model


def memory_budget(options: ServerOptions, device_type: str) -> float:
    """Bytes for a job's activations, gradients and optimizer: its part of the option, else of a
    part of the free host memory or of the GPU's. Scheduler and worker come to the same number,
    which on a GPU the worker takes from what the KV cache would get (runner/worker.py)."""
    if options.memory_gib is not None:
        total = options.memory_gib * 2**30
    elif device_type == "cpu":
        total = FREE_MEMORY_SHARE * psutil.virtual_memory().available
    else:
        from vllm.platforms import current_platform

        total = DEVICE_MEMORY_SHARE * current_platform.get_device_total_memory()
    return total / options.max_jobs_at_once


def job_store_path(options: ServerOptions) -> Path:
    """The SQLite file that API servers and engine share."""
    return Path(options.state_dir) / "jobs.sqlite3"


def requested(additional_config: Mapping[str, Any]) -> bool:
    """Whether co-serving was asked for: the key is there; an empty list means without a job."""
    return additional_config.get(JOBS_KEY) not in (None, False)


def read_options(additional_config: Mapping[str, Any]) -> ServerOptions:
    """Check the server-wide options.

    Raises:
        ValueError: an unknown key or an impossible value, with the option's name.
    """
    given = additional_config.get(OPTIONS_KEY) or {}
    if not isinstance(given, Mapping):
        raise ValueError(f"--co-finetune-config: expected a JSON object, got {given!r}")
    try:
        return ServerOptions.from_mapping(given)
    except JobError as error:
        raise ValueError(f"--co-finetune-config: {error}") from None


def normalise(
    additional_config: Mapping[str, Any],
    *,
    max_rank: int | None,
    reserved_names: Iterable[str],
) -> dict[str, Any]:
    """Read job files and check options: from what the user gave to what travels.

    A job that cannot be taken is logged in one line and carried as an error, so that the server
    still comes up. A value that is already normalised is returned as it is.

    Args:
        additional_config: with `co_finetune` a path, a job as a mapping, or a list of these.
        max_rank: highest LoRA rank that the user allowed; None if left to us.
        reserved_names: names under which the server serves models already.

    Raises:
        ValueError: `co_finetune` has another type, or an option is wrong.
    """
    if _is_normalised(additional_config):
        return dict(additional_config)
    options = read_options(additional_config)
    rank_limit = max_rank if max_rank is not None else supported_ranks()[-1]
    reserved = sorted(set(reserved_names))
    taken = dict.fromkeys(reserved, "a model of this server")
    entries = []
    for given in _as_list(additional_config[JOBS_KEY]):
        entry = _load(given)
        if entry.job is not None:
            entry = _admit(entry, entry.job, rank_limit, max_rank is not None, taken)
        if entry.job is not None:
            taken[entry.job.name] = entry.source
        else:
            for mistake in (entry.error or "").splitlines():
                logger.error("Finetune job %s is refused: %s", entry.label, mistake)
        entries.append(_write_entry(entry))
    return {
        **additional_config,
        JOBS_KEY: entries,
        OPTIONS_KEY: options.model_dump(mode="json"),
        RESERVED_NAMES_KEY: reserved,
        RANK_GIVEN_KEY: max_rank is not None,
    }


def supported_ranks() -> tuple[int, ...]:
    """Values that vLLM takes as `max_lora_rank`, ascending."""
    from vllm.config.lora import MaxLoRARanks

    return tuple(sorted(get_args(MaxLoRARanks)))


def required_rank(additional_config: Mapping[str, Any], max_lora_rank: int) -> int:
    """The smallest `max_lora_rank` of vLLM that serves the user and every job taken."""
    ranks = [entry["job"]["peft"]["r"] for entry in additional_config[JOBS_KEY] if "job" in entry]
    wanted = max([max_lora_rank, *ranks])
    return next(rank for rank in supported_ranks() if rank >= wanted)


def _is_normalised(additional_config: Mapping[str, Any]) -> bool:
    return RESERVED_NAMES_KEY in additional_config


def _as_list(given: Any) -> list[Any]:
    if given is True:
        return []
    if isinstance(given, str | Path | Mapping):
        return [given]
    if isinstance(given, list | tuple):
        return list(given)
    raise ValueError(
        f"co_finetune: expected a job file, a job as a mapping, or a list of these, got {given!r}"
    )


def _load(given: Any) -> JobEntry:
    """Read one job: a mapping, JSON text of one, or the path of a YAML file."""
    inline = isinstance(given, Mapping) or (isinstance(given, str) and given[:1] == "{")
    source = "inline" if inline else str(given)
    name = None
    try:
        if inline:
            mapping = json.loads(given) if isinstance(given, str) else dict(given)
            name = mapping["name"] if isinstance(mapping.get("name"), str) else None
            job = FinetuneJob.from_mapping(mapping)
        else:
            job = FinetuneJob.from_yaml(Path(given))
    except (JobError, OSError, json.JSONDecodeError) as error:
        lines = [line.removeprefix(f"{source}: ") for line in str(error).splitlines()]
        return JobEntry(source, error="\n".join(lines), name=name)
    return JobEntry(source, job=job, name=job.name)


def _admit(
    entry: JobEntry, job: FinetuneJob, rank_limit: int, user_limit: bool, taken: Mapping[str, str]
) -> JobEntry:
    """Refuse what depends on the server and not on the job alone."""
    if job.peft.r > rank_limit:
        whose = "the server was started with" if user_limit else "vLLM supports at most"
        error = f"peft.r is {job.peft.r}, but {whose} --max-lora-rank {rank_limit}; "
        if user_limit:
            error += "raise or leave out --max-lora-rank, or lower peft.r"
        else:
            error += "lower peft.r"
        return JobEntry(entry.source, error=error, name=job.name)
    if job.name in taken:
        error = f"name {job.name!r} is already used by {taken[job.name]}; choose another name"
        return JobEntry(entry.source, error=error, name=job.name)
    return entry


def _write_entry(entry: JobEntry) -> dict[str, Any]:
    if entry.job is None:
        named = {} if entry.name is None else {"name": entry.name}
        return {"source": entry.source, "error": entry.error, **named}
    return {"source": entry.source, "job": entry.job.model_dump(mode="json")}


def _read_entry(entry: Mapping[str, Any]) -> JobEntry:
    if "job" in entry:
        job = FinetuneJob.from_mapping(entry["job"])
        return JobEntry(entry["source"], job=job, name=job.name)
    return JobEntry(entry["source"], error=entry["error"], name=entry.get("name"))
