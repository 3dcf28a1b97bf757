"""A job's plan as text with bars, and as a picture."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from vllm_flexft.cli.sizing import JobPlan

BAR_WIDTH = 30


@dataclass(frozen=True, slots=True)
class KVBlocks:
    size: int  # tokens
    note: str = ""  # where the size comes from


def render(plan: JobPlan, blocks: KVBlocks, flops: float | None) -> str:
    """The tables. `flops`: FLOP/s of this machine, None where they were not measured."""
    return "\n\n".join(
        "\n".join(lines)
        for lines in (
            _head(plan),
            _steps(plan),
            _by_tensor(plan),
            _totals(plan, blocks),
            _server(plan),
            _work(plan, flops),
        )
    )


def _head(plan: JobPlan) -> list[str]:
    shape = plan.shape
    return [
        f"{shape.architecture}, {shape.num_layers} layers of {shape.hidden_size}; "
        f"backward runs through {len(plan.memory.kept)} of them"
    ]


def _steps(plan: JobPlan) -> list[str]:
    """From what the forward makes to the least, for the plan's tokens."""
    everything = plan.reduction[0][1]
    lines = [f"step by step, for {plan.tokens:,} tokens"]
    for name, size in plan.reduction:
        share = size / everything
        lines.append(f"  {name:34} {gib(size * plan.tokens)}  {_bar(share)}  {share:6.1%}")
    return lines


def _by_tensor(plan: JobPlan) -> list[str]:
    by_tensor = plan.memory.bytes_by_tensor()
    widest = max(by_tensor.values())
    lines = [f"kept for the backward, a token: {plan.memory.bytes_per_token:,} bytes"]
    for name, size in by_tensor.items():
        layers = sum(name in choice.kept for choice in plan.memory.kept.values())
        note = f"{layers} layers" if layers else "recomputed or not read"
        if name == "final_residual":
            note = "input of the final norm"
        lines.append(f"  {name:15} {size:>12,}  {_bar(size / widest)}  {note}")
    lines.append(f"  {'k, v':15} {0:>12,}  {_bar(0)}  read back from the paged KV cache")
    return lines


def _totals(plan: JobPlan, blocks: KVBlocks) -> list[str]:
    together = plan.activations + plan.working + plan.state
    return [
        f"for a micro-batch of {plan.tokens:,} tokens",
        f"  activations     {gib(plan.activations)}",
        f"  working buffers {gib(plan.working)}  (residual gradient; K, V, dK, dV of one layer; "
        "logits of a window)",
        f"  adapter         {gib(plan.state)}  ({plan.parameters:,} parameters with gradients and "
        "optimizer)",
        f"  together        {gib(together)}",
        f"  KV cache        {gib(plan.kv_per_token * plan.tokens)}  "
        f"({-(-plan.tokens // blocks.size):,} blocks of {blocks.size}{blocks.note}), lent by the "
        "server",
    ]


def _server(plan: JobPlan) -> list[str]:
    """What a server takes, between the least that it can run with and all that it has use for."""
    bounded = plan.largest_tokens is not None
    lanes = plan.lanes
    lines = [
        "a server with this budget" if bounded else "a server with room",
        f"  takes           {gib(plan.taken)}"
        + (f"  of {plan.budget / 2**30:.3f} GiB" if bounded else "")
        + f"  ({lanes.count} lane{'s' * (lanes.count > 1)} of {lanes.tokens:,} tokens)",
        f"  has weights of  {gib(plan.weights)}  (in the model's dtype)",
        f"  in all          {gib(plan.weights + plan.taken)}  and the KV cache",
        f"memory_gib may be anything from {plan.floor / 2**30:.3f} up; "
        f"with {plan.ceiling / 2**30:.3f} nothing is recomputed, "
        f"beyond {plan.most / 2**30:.3f} nothing is gained",
    ]
    if bounded:
        lines.append(f"longest sequence that fits: {plan.largest_tokens:,} tokens")
    return lines


def _work(plan: JobPlan, flops: float | None) -> list[str]:
    lines = [f"recomputed: {plan.recomputed_share:.1%} of the work"]
    if flops is not None:
        lines.append(
            f"expected when idle: {two_digits(flops / plan.work.total)} tokens/s "
            f"(this machine does {two_digits(flops / 1e9)} GFLOP/s)"
        )
    return lines


def two_digits(value: float) -> str:
    """Rounded to two significant digits: 1.4, 23, 1,200."""
    decimals = 1 - math.floor(math.log10(value))
    return f"{round(value, decimals):,.{max(0, decimals)}f}"


def draw(plan: JobPlan, path: Path) -> None:
    """The step-by-step table and the job's memory as bars. Raises ValueError without
    matplotlib."""
    try:
        import matplotlib
    except ImportError:
        raise ValueError("--png needs matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 3.6), layout="constrained")
    left.barh(
        [name for name, _ in plan.reduction],
        [size * plan.tokens / 2**30 for _, size in plan.reduction],
    )
    left.set_xlabel(f"GiB for {plan.tokens:,} tokens, step by step")
    parts = {
        **{name: size * plan.tokens for name, size in plan.memory.bytes_by_tensor().items()},
        "working buffers": plan.working,
        "adapter, optimizer": plan.state,
    }
    right.barh(list(parts), [size / 2**30 for size in parts.values()])
    right.set_xlabel("GiB that the job takes")
    for axes in (left, right):
        axes.invert_yaxis()
    figure.savefig(path, dpi=120, format="png")
    pyplot.close(figure)


def gib(size: float) -> str:
    return f"{size / 2**30:8.3f} GiB"


def _bar(share: float) -> str:
    return f"{'█' * round(BAR_WIDTH * share):{BAR_WIDTH}}"
