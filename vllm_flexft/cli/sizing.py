"""A job's memory and work from the model's config and a profile of the machine."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

from vllm_flexft.config import ActivationPolicy, FinetuneJob
from vllm_flexft.graph.job_memory import JobMemory, Lanes
from vllm_flexft.graph.memory import MemoryPlan, reduction
from vllm_flexft.graph.ops import ModelShape
from vllm_flexft.graph.work import TrainingWork

ITEMSIZE = {"float32": 4, "bfloat16": 2}
PROFILE_ROWS = 512  # of the GEMM that is timed: two backward windows
PROFILE_WEIGHTS = 2**26  # at most: 256 MiB in fp32


@dataclass(frozen=True, slots=True)
class JobPlan:
    """Everything that `flexft plan` prints. Bytes unless said otherwise."""

    shape: ModelShape
    memory: MemoryPlan
    reduction: list[tuple[str, int]]  # a token, step by step
    tokens: int  # of the longest sequence
    parameters: int  # of the adapter
    state: int  # masters, gradients, moments
    working: int  # with one lane of the longest sequence
    kv_per_token: int
    weights: int  # of the model as served
    budget: float
    floor: int  # the least budget for these tokens
    ceiling: int  # the budget of one sequence beyond which nothing is recomputed
    lanes: Lanes  # that a server with this budget makes
    taken: int  # by such a server for the job
    most: int  # that a server with room for everything takes
    largest_tokens: int | None  # longest sequence that fits the budget at all; None: no budget
    work: TrainingWork  # a token

    @property
    def recomputed_share(self) -> float:
        return self.work.recomputed / self.work.total

    @property
    def activations(self) -> int:
        return self.memory.bytes_per_token * self.tokens


def longest_sequence(job: FinetuneJob) -> int:
    """Tokens that a row of the job may have."""
    validation = 0 if job.validation is None else job.validation.max_length
    return max(job.dataset.max_length, validation)


def plan_job(
    shape: ModelShape,
    job: FinetuneJob,
    *,
    dtype: str,
    budget_gib: float,
    policy: ActivationPolicy = "auto",
    positions: int | None = None,
) -> JobPlan:
    """`positions`: of the model; no sequence is longer.

    Raises ValueError where the budget is too small, with the number that would do.
    """
    budget, tokens = budget_gib * 2**30, longest_sequence(job)
    lane = Lanes(1, tokens)
    needs = JobMemory.of(shape, job, ITEMSIZE[dtype], policy)
    largest = _largest(needs, budget, positions)
    try:
        memory = needs.plan(lane, budget)
    except ValueError as error:
        raise ValueError(f"at max_length {tokens:,} {error}; {_what_fits(largest)}") from None
    lanes = needs.lanes_within(tokens, budget)
    return JobPlan(
        shape=shape,
        memory=memory,
        reduction=reduction(memory, shape.num_layers),
        tokens=tokens,
        parameters=needs.parameters,
        state=needs.state_bytes,
        working=needs.working_bytes(lane),
        kv_per_token=2 * shape.num_kv_heads * shape.head_dim * needs.itemsize * shape.num_layers,
        weights=shape.weight_parameters * needs.itemsize,
        budget=budget,
        floor=needs.taken_bytes(lane, needs.least_policy),
        ceiling=needs.taken_bytes(lane, "fast"),
        lanes=lanes,
        taken=needs.taken_bytes(lanes, budget=budget),
        most=needs.taken_bytes(needs.lanes_within(tokens, math.inf)),
        largest_tokens=largest,
        work=TrainingWork.of(shape, memory, needs.parameters),
    )


def _largest(needs: JobMemory, budget: float, positions: int | None) -> int | None:
    """Tokens of the longest sequence that fits; None without a budget."""
    if math.isinf(budget):
        return None
    one, two = (needs.taken_bytes(Lanes(1, n), needs.least_policy) for n in (1, 2))
    fits = max(0, 1 + int((budget - one) // (two - one)))
    return fits if positions is None else min(fits, positions)


def _what_fits(largest: int | None) -> str:
    if not largest or largest < 2:
        return "no sequence would fit"
    return (
        f"sequences of up to {largest:,} tokens would fit, and a server goes by the longest row of "
        "the data"
    )


def measured_flops(shape: ModelShape, dtype: str, seconds: float = 1.0) -> float:
    """FLOP/s of this machine on a GEMM of the model's MLP, by a short profile."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    kind, inputs = getattr(torch, dtype), shape.hidden_size
    outputs = max(1, min(shape.intermediate_size, PROFILE_WEIGHTS // inputs))
    x = torch.randn(PROFILE_ROWS, inputs, dtype=kind, device=device)
    weight = torch.randn(outputs, inputs, dtype=kind, device=device)
    x @ weight.T
    done, started = 0, time.perf_counter()
    while time.perf_counter() - started < seconds:
        x @ weight.T
        done += 1
        if device == "cuda":
            torch.cuda.synchronize()
    return 2.0 * PROFILE_ROWS * inputs * outputs * done / (time.perf_counter() - started)
