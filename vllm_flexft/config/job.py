"""The finetune job: the one object behind the YAML file, the HTTP request and the Python call."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import Field, ValidationError, field_validator, model_validator

from vllm_flexft.config import yaml_io
from vllm_flexft.config.base import FilePath, Section, absolute
from vllm_flexft.config.dataset import DatasetConfig, ValidationConfig
from vllm_flexft.config.errors import JobError, explain
from vllm_flexft.config.peft import PeftConfig
from vllm_flexft.config.server import ServerOptions
from vllm_flexft.config.training import TrainingConfig

DATA_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
REPORTERS = ("tensorboard", "wandb")
# How a job is run and kept, not what it trains: left out of its hash.
QUEUE_KEYS = ("priority", "weight", "slo", "report_to")
SAVE_KEYS = ("save_steps", "save_total_limit")  # of `training`


class SLOConfig(Section):
    """Latency that inference must keep while this job trains; null takes the server's."""

    tpot_ms: float | None = Field(
        None, gt=0, description="null (the server's), or milliseconds > 0 per output token"
    )
    ttft_ms: float | None = Field(
        None, gt=0, description="null (the server's), or milliseconds > 0 to the first token"
    )


class FinetuneJob(Section):
    """One LoRA finetuning job.

    Build it with `from_yaml` or `from_mapping`: these explain every mistake in a `JobError`.
    Relative paths (dataset, output, init_adapter), also those of a YAML file, are relative to the
    working directory of the command that reads the job, and are made absolute there, so that the
    job means the same in the engine's process.
    """

    name: str = Field(
        pattern=r"^[A-Za-z0-9._-]{1,64}\z",
        description="1 to 64 of the characters A-Z a-z 0-9 . _ - (quote a number), the name that "
        "the adapter is served under",
    )
    dataset: DatasetConfig = Field(description="a mapping with at least a path")
    validation: ValidationConfig | None = Field(
        None, description="null, or a mapping with at least a path"
    )
    peft: PeftConfig = Field(default_factory=PeftConfig, description="a mapping")
    training: TrainingConfig = Field(default_factory=TrainingConfig, description="a mapping")
    slo: SLOConfig | None = Field(None, description="null, or a mapping")
    priority: int = Field(
        0, description="an integer: of the jobs that wait, the one with the highest starts first"
    )
    weight: float = Field(
        1.0,
        ge=0.01,
        le=100.0,
        description="a number from 0.01 to 100: this job's share against other jobs in training",
    )
    output_dir: FilePath | None = Field(None, description="null, or a folder")
    report_to: tuple[str, ...] = Field(
        (), description="a list out of tensorboard, wandb; or [] (metrics.jsonl alone)"
    )

    # ---- doors

    @classmethod
    def from_yaml(cls, path: str | Path) -> FinetuneJob:
        """The job in a YAML file. Raises `JobError`, each line beginning with the file's name."""
        try:
            return cls.from_mapping(yaml_io.load(Path(path)))
        except JobError as exc:
            raise JobError("\n".join(f"{path}: {line}" for line in str(exc).split("\n"))) from None

    @classmethod
    def from_mapping(
        cls, mapping: Mapping[str, Any], *, base_dir: str | Path | None = None
    ) -> FinetuneJob:
        """The job in a mapping of plain values, as JSON and YAML have them.

        Args:
            base_dir: what relative paths are relative to; the working directory unless given.

        Raises:
            JobError: one line for every mistake.
        """
        if not isinstance(mapping, Mapping):
            raise JobError(f"expected a mapping of keys and values, got {mapping!r:.80}")
        try:
            job = cls.model_validate(dict(mapping))
        except ValidationError as exc:
            raise JobError(explain(exc, cls)) from None
        return job._with_absolute_paths(Path(base_dir or "."))

    # ---- what a job leaves on disk

    def to_yaml(self) -> str:
        """The job with every default filled in, as written to `output_dir/job.yaml`.

        Reading it back gives an equal job.
        """
        return yaml_io.dump(self.model_dump(mode="json"))

    def config_hash(self) -> str:
        """SHA-256 (hex) of the job: equal for jobs that train the same, in every process and
        version."""
        trained = what_is_trained(self.model_dump(mode="json"))
        canonical = json.dumps(trained, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
        return hashlib.sha256(canonical.encode()).hexdigest()

    def resolve_output_dir(self, options: ServerOptions) -> Path:
        """Where the job writes: `output_dir`, else `state_dir/adapters/<name>`."""
        return self.output_dir or absolute(options.state_dir, Path()) / "adapters" / self.name

    def with_output_dir(self, options: ServerOptions) -> FinetuneJob:
        """This job with `output_dir` filled in."""
        return self.model_copy(update={"output_dir": self.resolve_output_dir(options)})

    def _with_absolute_paths(self, base_dir: Path) -> FinetuneJob:
        peft, output_dir = self.peft, self.output_dir
        if peft.init_adapter is not None:
            peft = peft.model_copy(update={"init_adapter": absolute(peft.init_adapter, base_dir)})
        return self.model_copy(
            update={
                "dataset": _with_absolute_path(self.dataset, base_dir),
                "validation": self.validation and _with_absolute_path(self.validation, base_dir),
                "peft": peft,
                "output_dir": output_dir and absolute(output_dir, base_dir),
            }
        )

    # ---- validation

    @field_validator("name")
    @classmethod
    def _no_dots_only(cls, value: str) -> str:
        if not value.strip("."):  # would name a folder outside of state_dir/adapters
            raise ValueError("a name of dots alone; expected at least one other character")
        return value

    @field_validator("report_to", mode="before")
    @classmethod
    def _check_report_to(cls, value: Any) -> Any:
        if value is None or value == "none":
            return ()
        names = (value,) if isinstance(value, str) else value
        if not isinstance(names, list | tuple):
            return value
        for name in names:
            if name not in REPORTERS:
                raise ValueError(f"{name!r} is none of {', '.join(REPORTERS)}")
            if importlib.util.find_spec(name) is None:
                raise ValueError(f"{name} is not installed here: pip install {name}")
        return tuple(dict.fromkeys(names))

    @model_validator(mode="after")
    def _fill_validation_from_dataset(self) -> FinetuneJob:
        if self.validation is not None:
            inherited = {
                key: getattr(self.dataset, key)
                for key in DatasetConfig.model_fields
                if key not in self.validation.model_fields_set
            }
            # `__dict__`, since a frozen model refuses assignment even while it is being built.
            self.__dict__["validation"] = self.validation.model_copy(update=inherited)
        elif self.training.early_stopping_patience is not None:
            raise ValueError(
                f"training.early_stopping_patience: got {self.training.early_stopping_patience}, "
                "but there is no validation; give validation.path"
            )
        return self


def what_is_trained(job: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a job, as plain values with every default filled in, that its weights depend
    on."""
    trained = {key: value for key, value in job.items() if key not in QUEUE_KEYS}
    training = trained["training"]
    trained["training"] = {key: training[key] for key in training if key not in SAVE_KEYS}
    return trained


D = TypeVar("D", bound=DatasetConfig)


def _with_absolute_path(config: D, base_dir: Path) -> D:
    path = Path(config.path).expanduser()
    full = absolute(path, base_dir)
    # "org/name" is left as typed: the data reader's error then shows what the user wrote.
    if path.suffix.lower() not in DATA_SUFFIXES and not full.exists():
        return config
    return config.model_copy(update={"path": str(full)})
