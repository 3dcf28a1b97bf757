"""The demo's pictures and tables: loss curve, latency, answers side by side."""

from __future__ import annotations

import math
import os
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from demo_traffic import RequestTiming

from vllm_flexft.config import FinetuneJob, SLOConfig

WIDTH = 78  # of the last screen, in characters
EIGHTHS = " ▁▂▃▄▅▆▇█"  # a character cell filled from below, by eighths


@dataclass(frozen=True)
class Latency:
    """A set of requests in numbers; times in seconds, NaN where nothing was answered."""

    answered: int
    failed: int
    ttft_p50: float
    ttft_p99: float
    tpot_p50: float
    tpot_p99: float


def latency(timings: Iterable[RequestTiming]) -> Latency:
    timings = list(timings)
    good = [t for t in timings if t.error is None]
    ttft, tpot = [t.ttft for t in good], [t.tpot for t in good]
    return Latency(
        answered=len(good),
        failed=len(timings) - len(good),
        ttft_p50=percentile(ttft, 50),
        ttft_p99=percentile(ttft, 99),
        tpot_p50=percentile(tpot, 50),
        tpot_p99=percentile(tpot, 99),
    )


def percentile(values: Sequence[float], q: float) -> float:
    """The q-th percentile, interpolated linearly; NaN of nothing."""
    return float(np.percentile(values, q)) if values else math.nan


def latency_table(
    rows: Sequence[tuple[str, Latency]], ttft_slo_ms: float, tpot_slo_ms: float
) -> list[str]:
    """A line a set of requests, times in milliseconds, and the objectives below them."""
    line = "{:<22}{:>8}{:>8}  {:>9}{:>8}  {:>9}{:>8}".format
    lines = [
        f"{'':40}{'first token, ms':>17}  {'each next one, ms':>17}",
        line("", "answered", "failed", "p50", "p99", "p50", "p99"),
    ]
    for name, it in rows:
        times = (f"{s * 1e3:.0f}" for s in (it.ttft_p50, it.ttft_p99, it.tpot_p50, it.tpot_p99))
        lines.append(line(name, it.answered, it.failed, *times))
    lines.append(line("objective", "", "", "", f"{ttft_slo_ms:.0f}", "", f"{tpot_slo_ms:.0f}"))
    return lines


def curve(values: Sequence[float], width: int = 60, height: int = 8) -> list[str]:
    """`values` as an area from 0 to their maximum, `height` + 1 lines with the y axis at the left.

    The x axis is the index: more values than columns are averaged, fewer are joined by lines.
    """
    finite = [v for v in values if math.isfinite(v)]
    if not finite:
        return ["(no values)"]
    columns = _resample(finite, width)
    top = max(columns.max(), 1e-9)
    filled = np.rint(columns / top * height * 8).astype(int)  # eighths of a cell
    lines = []
    for row in range(height - 1, -1, -1):
        cells = "".join(EIGHTHS[max(0, min(8, f - 8 * row))] for f in filled)
        label = {height - 1: f"{top:.2f}", (height - 1) // 2: f"{top / 2:.2f}"}.get(row, "")
        lines.append(f"{label:>6} │{cells.rstrip()}")
    lines.append(f"{'0':>6} └{'─' * width}")
    return lines


def _resample(values: Sequence[float], width: int) -> np.ndarray:
    """`width` columns: means where values are many, linear interpolation where they are few."""
    array = np.asarray(values, dtype=float)
    if len(array) <= width:
        return np.interp(np.linspace(0, len(array) - 1, width), np.arange(len(array)), array)
    return np.array([part.mean() for part in np.array_split(array, width)])


def save_png(values: Sequence[float], path: Path) -> bool:
    """The loss curve as a picture; False where matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    axes.plot(range(1, len(values) + 1), values)
    axes.set(xlabel="optimizer step", ylabel="loss (mean over supervised tokens)")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return True


def answers(question: str, given: Sequence[tuple[str, str]]) -> list[str]:
    """A question and what each model says to it."""
    lines = [f"“{question}”"]
    label = max(len(model) for model, _ in given) + 2
    for model, answer in given:
        body = textwrap.wrap(" ".join(answer.split()), WIDTH - 4 - label) or ["(nothing)"]
        lines += [f"  {model if i == 0 else '':<{label}}{text}" for i, text in enumerate(body)]
    return lines


def section(title: str, lines: Iterable[str]) -> list[str]:
    """A titled block of the last screen."""
    return ["", f"── {title} ".ljust(WIDTH, "─"), *(f"  {line}".rstrip() for line in lines)]


def last_screen(
    job: FinetuneJob,
    *,
    job_file: Path,
    model: Path,
    adapter: Path,
    metrics: Sequence[Mapping[str, Any]],
    seconds: float,
    during: Latency,
    after: Latency,
    given: Sequence[tuple[str, Sequence[tuple[str, str]]]],
    picture: Path,
    load: float,
) -> list[str]:
    """Everything that the demo has to show, and saves the loss curve as `picture`.

    Args:
        model, adapter: folders, as printed in commands.
        metrics: lines of metrics.jsonl.
        seconds: that the job took.
        during, after: requests while the job trained, and once it had ended.
        given: questions with the answers of (model, answer) pairs.
        load: the machine's load average before the demo began.
    """
    losses = [line["loss"] for line in metrics]
    slo = job.slo or SLOConfig()
    title = "  One server, one copy of the weights: it answered requests and trained an adapter"
    lines = ["═" * WIDTH, title, "═" * WIDTH]
    table = latency_table(
        [("while training", during), ("nothing to train", after)],
        slo.ttft_ms or math.nan,
        slo.tpot_ms or math.nan,
    )
    cores = os.cpu_count() or 1
    if load > cores / 2:
        table += [
            "",
            f"This machine was busy before the demo began: load {load:.1f} on {cores} cores.",
        ]
    lines += section("what clients measured", table)
    tokens = metrics[-1]["num_input_tokens"]
    picture_of = curve(losses)
    picture_of.append(f"{'':8}step 1{f'step {len(losses)}':>54}")
    if save_png(losses, picture):
        picture_of.append(f"{'':8}as a picture: {picture}")
    heading = f"training: {len(losses)} steps, {tokens:,} tokens in {seconds:.0f} s"
    heading += f"; loss {losses[0]:.2f} -> {losses[-1]:.2f}"
    lines += section(heading, picture_of)
    both = [line for question, said in given for line in answers(question, said)]
    lines += section("questions that the training rows do not ask", both)
    size = (adapter / "adapter_model.safetensors").stat().st_size / 2**20
    rank = next(r for r in (16, 32, 64, 128, 256, 320, 512) if r >= job.peft.r)
    return lines + section(
        "the adapter",
        [
            f"{adapter}/adapter_model.safetensors ({size:.1f} MiB), adapter_config.json",
            "",
            "serve it:",
            f"  .venv/bin/vllm serve {model} --kv-cache-memory-bytes 1G \\",
            f"      --enable-lora --max-lora-rank {rank} --lora-modules {job.name}={adapter}",
            "load it in Python:",
            f'  model = AutoModelForCausalLM.from_pretrained("{model}")',
            f'  model = PeftModel.from_pretrained(model, "{adapter}")',
            "train your own:",
            f"  .venv/bin/vllm serve {model} --kv-cache-memory-bytes 1G \\",
            f"      --co-finetune job.yaml    # like {job_file}",
        ],
    )
