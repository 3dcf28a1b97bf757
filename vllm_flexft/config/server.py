"""Server-wide options, vLLM's `--co-finetune-config` JSON."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from vllm_flexft.config.base import FilePath, Section
from vllm_flexft.config.errors import JobError, explain

ActivationPolicy = Literal["auto", "fast", "minimal", "offload"]
STATE_DIR_VARIABLE = "VLLM_FLEXFT_STATE_DIR"


def _default_state_dir() -> Path:
    from_environment = os.environ.get(STATE_DIR_VARIABLE)
    return Path(from_environment or "~/.cache/vllm-flexft").expanduser()


class ServerOptions(Section):
    """Defaults and limits that hold for every job of a server."""

    tpot_ms: float | None = Field(
        None, gt=0, description="null (50), or milliseconds > 0 per output token"
    )
    ttft_ms: float | None = Field(
        None, gt=0, description="null (5000), or milliseconds > 0 to the first token"
    )
    min_share: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="a number from 0 (finetuning only gets what the objectives leave) to below 1: "
        "the part of a busy step's time that finetuning gets in any case",
    )
    state_dir: FilePath = Field(
        default_factory=_default_state_dir,
        description="the folder of the job store and of default outputs",
    )
    step_trace: FilePath | None = Field(
        None,
        description="null, or a .jsonl or .csv file that is written when the server stops in order "
        "(vllm serve: with --shutdown-timeout 10): a line for each of the last 65536 steps",
    )
    memory_gib: float | None = Field(
        None, gt=0, description="null (what the engine leaves free), or GiB > 0"
    )
    activation_policy: ActivationPolicy = Field(
        "auto",
        description="auto (keep what fits memory_gib, recompute the rest), fast (keep all that is "
        "read), minimal (recompute all that can be), or offload (keep all, in host memory)",
    )
    overlap_backward: bool = Field(
        False,
        description="false (the backward runs after the forward of its step), or true (on a GPU it "
        "runs beside later forwards, on a stream of its own)",
    )
    backward_sms: int | None = Field(
        None,
        ge=1,
        description="null (all), or an integer >= 1: multiprocessors of the GPU that the backward "
        "may use while overlap_backward has it run beside forwards",
    )
    max_jobs_at_once: int = Field(
        1, ge=1, description="an integer >= 1, jobs that train at the same time"
    )
    max_rows_in_flight: int = Field(
        8, ge=1, description="an integer >= 1, training sequences in the engine at a time"
    )
    experimental_cuda: bool = Field(
        False,
        description="true or false: finetune on CUDA, where no step has been verified yet",
    )

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any] | None = None) -> ServerOptions:
        """Options from the JSON of `--co-finetune-config`; raises `JobError`."""
        try:
            return cls.model_validate(dict(mapping or {}))
        except ValidationError as exc:
            raise JobError(explain(exc, cls, "co-finetune-config")) from None
