"""`flexft plan`: what a job will cost, from the model's config alone.

No weights are loaded, so a 70B job can be sized on a laptop.
"""

from __future__ import annotations

import argparse
import math
import time
from dataclasses import dataclass
from pathlib import Path

from vllm_flexft.config import FinetuneJob
from vllm_flexft.graph.families import target_layers, target_names
from vllm_flexft.graph.memory import (
    MemoryPlan,
    adapter_parameters,
    plan_memory,
    training_state_bytes,
    working_bytes,
)
from vllm_flexft.graph.ops import ModelShape
from vllm_flexft.graph.policy import Policy

ITEMSIZE = {"float32": 4, "bfloat16": 2}
BAR_WIDTH = 40


@dataclass(frozen=True, slots=True)
class JobPlan:
    """Everything that `flexft plan` prints. Bytes unless said otherwise."""

    shape: ModelShape
    memory: MemoryPlan
    tokens: int  # of a micro-batch
    parameters: int  # of the adapter
    state: int  # masters, gradients, moments
    working: int
    kv_per_token: int
    budget: float
    largest_tokens: int | None  # longest sequence that fits the budget at all; None: no budget
    flops_per_token: float  # of training: forward, dX, and what is recomputed

    @property
    def recomputed_share(self) -> float:
        return self.memory.recompute_flops / self.flops_per_token

    @property
    def activations(self) -> int:
        return self.memory.bytes_per_token * self.tokens


def plan_job(
    shape: ModelShape, job: FinetuneJob, *, dtype: str, budget_gib: float, policy: Policy = "auto"
) -> JobPlan:
    """Raises ValueError where the budget is too small, with the number that would do."""
    itemsize, budget = ITEMSIZE[dtype], budget_gib * 2**30
    tokens = job.dataset.max_length
    targets = target_names(job.peft.target_modules)
    layers = target_layers(job.peft.layers_to_transform, shape.num_layers)
    parameters = adapter_parameters(shape, targets, layers, job.peft.r)
    state = training_state_bytes(parameters, job.training.optim)

    memory = plan_memory(
        shape,
        targets=targets,
        layers=layers,
        tokens=tokens,
        context=tokens,
        itemsize=itemsize,
        memory_bytes=budget,
        other_bytes=state + working_bytes(shape, tokens, itemsize),
        policy=policy,
    )
    least = plan_memory(
        shape,
        targets=targets,
        layers=layers,
        tokens=1,
        context=1,
        itemsize=itemsize,
        memory_bytes=math.inf,
        policy="minimal",
    ).bytes_per_token
    a_token = least + working_bytes(shape, 1, itemsize)
    largest = None if math.isinf(budget) else int((budget - state) / a_token)
    trained_layers = shape.num_layers - min(layers)
    forward = 2.0 * shape.num_layers * shape.layer_parameters
    backward = 2.0 * trained_layers * shape.layer_parameters
    head = 4.0 * shape.hidden_size * shape.vocab_size
    return JobPlan(
        shape=shape,
        memory=memory,
        tokens=tokens,
        parameters=parameters,
        state=state,
        working=working_bytes(shape, tokens, itemsize),
        kv_per_token=2 * shape.num_kv_heads * shape.head_dim * itemsize * shape.num_layers,
        budget=budget,
        largest_tokens=largest,
        flops_per_token=forward + backward + head + memory.recompute_flops,
    )


def measured_flops(shape: ModelShape, dtype: str, seconds: float = 1.0) -> float:
    """FLOP/s of this machine on a GEMM of the model's MLP, by a short profile."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    kind = getattr(torch, dtype)
    rows, inputs = 512, shape.hidden_size
    outputs = min(shape.intermediate_size, 2**26 // inputs)  # at most 256 MiB of fp32
    x = torch.randn(rows, inputs, dtype=kind, device=device)
    weight = torch.randn(outputs, inputs, dtype=kind, device=device)
    x @ weight.T
    done, started = 0, time.perf_counter()
    while time.perf_counter() - started < seconds:
        x @ weight.T
        done += 1
    if device == "cuda":
        torch.cuda.synchronize()
    return 2.0 * rows * inputs * outputs * done / (time.perf_counter() - started)


def render(plan: JobPlan, block_size: int, flops: float | None) -> str:
    """The table and the picture."""
    memory, tokens = plan.memory, plan.tokens
    trained = len(memory.kept)
    lines = [
        f"{plan.shape.architecture}, {plan.shape.num_layers} layers of {plan.shape.hidden_size}; "
        f"backward runs through {trained} of them",
        "",
        f"kept for the backward, a token: {memory.bytes_per_token:,} bytes",
    ]
    by_tensor = memory.bytes_by_tensor()
    widest = max(max(by_tensor.values()), 1)
    for name, size in by_tensor.items():
        layers = sum(name in choice.kept for choice in memory.kept.values())
        bar = "█" * round(BAR_WIDTH * size / widest)
        note = f"{layers} layers" if layers else "recomputed or not read"
        if name == "final_residual":
            note = "input of the final norm"
        lines.append(f"  {name:15} {size:>12,}  {bar:{BAR_WIDTH}}  {note}")
    lines += [
        f"  {'k, v':15} {0:>12,}  {'':{BAR_WIDTH}}  read back from the paged KV cache",
        "",
        f"for a micro-batch of {tokens:,} tokens",
        f"  activations     {_gib(plan.activations)}",
        f"  working buffers {_gib(plan.working)}  (residual gradient; K, V, dK, dV of one layer)",
        f"  adapter         {_gib(plan.state)}  ({plan.parameters:,} parameters with gradients and "
        "optimizer)",
        f"  together        {_gib(plan.activations + plan.working + plan.state)}"
        + ("" if plan.largest_tokens is None else f"  of {_gib(plan.budget).strip()}"),
        f"  KV cache        {_gib(plan.kv_per_token * tokens)}  "
        f"({-(-tokens // block_size):,} blocks of {block_size}), lent by the server",
        "",
        *(
            []
            if plan.largest_tokens is None
            else [f"longest sequence that fits  {plan.largest_tokens:,} tokens"]
        ),
        f"recomputed                  {plan.recomputed_share:.1%} of the work",
    ]
    if flops is not None:
        lines.append(
            f"expected when idle          {flops / plan.flops_per_token:,.0f} tokens/s "
            f"(this machine does {flops / 1e9:,.0f} GFLOP/s)"
        )
    return "\n".join(lines)


def _gib(size: float) -> str:
    return f"{size / 2**30:8.3f} GiB"


def add_command(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("plan", help="what a job will cost in memory and time")
    parser.add_argument("model", help="model folder, config.json or Hugging Face id")
    parser.add_argument("job", nargs="?", help="job file; without one: all linears, r 8")
    parser.add_argument("--max-length", type=int, help="tokens, in place of the job's")
    parser.add_argument("--memory-gib", type=float, default=float("inf"), help="budget")
    parser.add_argument("--policy", choices=["auto", "fast", "minimal"], default="auto")
    parser.add_argument("--dtype", choices=list(ITEMSIZE), help="default: the model's")
    parser.add_argument("--block-size", type=int, default=16, help="tokens of a KV-cache block")
    parser.add_argument("--no-profile", action="store_true", help="do not measure this machine")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(arguments.model)
    if arguments.job is not None:
        job = FinetuneJob.from_yaml(Path(arguments.job))
    else:
        job = FinetuneJob.from_mapping({"name": "plan", "dataset": {"path": "rows.jsonl"}})
    if arguments.max_length is not None:
        dataset = job.dataset.model_copy(update={"max_length": arguments.max_length})
        job = job.model_copy(update={"dataset": dataset})
    dtype = arguments.dtype or str(config.dtype or "bfloat16").removeprefix("torch.")
    shape = ModelShape.from_hf_config(config)
    plan = plan_job(
        shape, job, dtype=dtype, budget_gib=arguments.memory_gib, policy=arguments.policy
    )
    flops = None if arguments.no_profile else measured_flops(shape, dtype)
    print(render(plan, arguments.block_size, flops))
    return 0
