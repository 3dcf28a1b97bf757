"""The seam between scheduler and worker: what a step does for finetuning.

The scheduler attaches a `StepPlan` to vLLM's `SchedulerOutput` and the worker answers with a
`StepResult` on vLLM's `ModelRunnerOutput`. Both cross a process border, so they hold plain data
only. Every rank acts on the plan alone: the scheduler never waits for a result to decide.

Order inside a step: open -> forward of the batch with the chunks in it -> backward slices ->
optimizer update -> save -> close.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from vllm_flexft.config import ActivationPolicy, FinetuneJob

PLAN_ATTRIBUTE = "flexft_plan"  # on SchedulerOutput
RESULT_ATTRIBUTE = "flexft_result"  # on ModelRunnerOutput


@dataclass(frozen=True, slots=True)
class Windows:
    """Tokens of a backward slice: see graph/grid.py."""

    layer: int
    loss: int


@dataclass(frozen=True, slots=True)
class OpenJob:
    """Make the worker ready to train: adapter, optimizer, activation lanes."""

    job_id: str
    job: FinetuneJob
    config_hash: str
    output_dir: str
    base_model: str
    lora_int_id: int
    windows: Windows  # of the backward
    lane_tokens: int  # capacity of an activation lane = most tokens of a micro-batch
    num_lanes: int
    activation_policy: ActivationPolicy
    memory_bytes: float  # for kept activations, working buffers, gradients and optimizer
    resume_from: str | None  # a checkpoint folder


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Sequences whose activations live together in one lane, concatenated.

    Rows of the lane are `offsets[i] : offsets[i + 1]` for sequence i.
    """

    id: int
    lane: int
    token_ids: np.ndarray  # (T,) int32, all sequences concatenated
    supervised: np.ndarray  # (T,) bool: token t is a target
    offsets: tuple[int, ...]  # sequence borders, len = sequences + 1
    loss_scale: float  # 1 / supervised tokens of the optimizer step
    train: bool  # False: evaluation, no backward below the loss

    @property
    def num_tokens(self) -> int:
        return self.offsets[-1]


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens of one sequence that ride in this step's batch as a request of their own."""

    req_id: str
    lane: int
    row: int  # first row in the lane
    num_tokens: int


@dataclass(frozen=True, slots=True)
class BackwardSlices:
    """Run the next `count` slices of a micro-batch.

    `block_ids` comes with the first slices after a forward pass (shape: sequences x KV-cache
    groups x blocks): where the micro-batch's keys and values lie.
    """

    micro_batch: int
    count: int
    block_ids: tuple[tuple[list[int], ...], ...] | None = None


@dataclass(frozen=True, slots=True)
class OptimizerStep:
    step: int  # 0-based
    learning_rate: float
    epoch: float  # epochs done after it
    num_tokens: int  # supervised, since the run began
    num_input_tokens: int  # since the run began
    step_input_tokens: int


@dataclass(frozen=True, slots=True)
class SaveRequest:
    """Write a checkpoint of the state after this step; `final`: the finished adapter too."""

    step: int  # optimizer steps done
    counters: dict[str, Any]
    final: bool
    evaluations: tuple[Mapping[str, Any], ...] = ()  # recent lines of metrics.jsonl


@dataclass(frozen=True, slots=True)
class StepPlan:
    job_id: str
    open_job: OpenJob | None = None
    begin: tuple[MicroBatch, ...] = ()
    chunks: tuple[Chunk, ...] = ()
    backward: tuple[BackwardSlices, ...] = ()
    optimizer_step: OptimizerStep | None = None
    save: SaveRequest | None = None
    close_job: bool = False
    wait_for_writer: bool = False  # nothing else to do: let the disk finish


@dataclass(frozen=True, slots=True)
class EvaluationLoss:
    """Of a micro-batch that is evaluated."""

    micro_batch: int
    loss_sum: float  # over supervised tokens, unscaled
    num_correct: int


@dataclass(frozen=True, slots=True)
class Written:
    """What became of a `SaveRequest`: a checkpoint or final adapter on disk, or why not."""

    step: int
    path: str | None
    final: bool
    warning: str | None = None


@dataclass(frozen=True, slots=True)
class StepResult:
    job_id: str
    opened: bool = False
    evaluated: tuple[EvaluationLoss, ...] = ()
    updated_step: int | None = None
    loss: float | None = None  # of the updated step, mean over its supervised tokens
    grad_norm: float | None = None
    written: tuple[Written, ...] = ()
    error: str | None = None  # the job cannot go on; nothing of this step was applied
