"""A job's memory and work from the model's config and a profile of the machine."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

from vllm_flexft.config import ActivationPolicy, FinetuneJob
from vllm_flexft.graph.job_memory import JobMemory, Lanes
from vllm_flexft.graph.memory import MemoryPlan, reduction
from vllm_flexft.graph.ops import ModelShape

ITEMSIZE = {"float32": 4, "bfloat16": 2}
PROFILE_ROWS = 512  # of the GEMM that is timed: two backward windows
PROFILE_WEIGHTS = 2**26  # at most: 256 MiB in fp32


@dataclass(frozen=True, slots=True)
class JobPlan:
    """Everything that `flexft plan` prints. Bytes unless said otherwise."""

    shape: ModelShape
    memory: MemoryPlan
    reduction: list[tuple[str, int]]  # a token, step by step
    tokens: int  # of a micro-batch
    parameters: int  # of the adapter
    state: int  # masters, gradients, moments
    working: int
    kv_per_token: int
    budget: float
    floor: int  # the least budget for these tokens
    ceiling: int  # the budget beyond which nothing is gained
    largest_tokens: int | None  # longest sequence that fits the budget at all; None: no budget
    flops_per_token: float  # of training: forward, dX, and what is recomputed

    @property
    def recomputed_share(self) -> float:
        return self.memory.recompute_flops / self.flops_per_token

    @property
    def activations(self) -> int:
        return self.memory.bytes_per_token * self.tokens

    @property
    def total(self) -> int:
        return self.activations + self.working + self.state


def plan_job(
    shape: ModelShape,
    job: FinetuneJob,
    *,
    dtype: str,
    budget_gib: float,
    policy: ActivationPolicy = "auto",
) -> JobPlan:
    """Raises ValueError where the budget is too small, with the number that would do."""
    budget, tokens = budget_gib * 2**30, job.dataset.max_length
    lanes = Lanes(1, tokens)
    needs = JobMemory.of(shape, job, ITEMSIZE[dtype], policy)
    memory = needs.plan(lanes, budget)
    working, state = needs.working_bytes(lanes), needs.state_bytes
    least = needs.plan(lanes, math.inf, needs.least_policy).bytes_per_token
    most = needs.plan(lanes, math.inf, "fast").bytes_per_token
    a_token = least + needs.working_bytes(Lanes(1, 1))
    trained_layers = shape.num_layers - min(needs.layers)
    forward = 2.0 * shape.num_layers * shape.layer_parameters
    backward = 2.0 * trained_layers * shape.layer_parameters
    head = 4.0 * shape.hidden_size * shape.vocab_size
    return JobPlan(
        shape=shape,
        memory=memory,
        reduction=reduction(memory, shape.num_layers),
        tokens=tokens,
        parameters=needs.parameters,
        state=state,
        working=working,
        kv_per_token=2 * shape.num_kv_heads * shape.head_dim * needs.itemsize * shape.num_layers,
        budget=budget,
        floor=least * tokens + working + state,
        ceiling=most * tokens + working + state,
        largest_tokens=None if math.isinf(budget) else int((budget - state) / a_token),
        flops_per_token=forward + backward + head + memory.recompute_flops,
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
