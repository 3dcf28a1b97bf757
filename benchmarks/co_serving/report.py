"""What a run of the co-serving benchmark leaves: lines, a JSON file, plots."""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.co_serving.client import Answer
from benchmarks.co_serving.measures import Result, Slo, Update

KEYS = ("tpot_p99_ms", "ttft_p99_ms", "attainment", "finetune_tps")
HEADER = (
    "load      system             requests  TTFT mean    p99   TPOT mean    p99   attained"
    "  goodput/s  finetune tok/s"
)


def row(load: str, system: str, result: Result) -> str:
    return (
        f"{load:9} {system:18} {result.complete:4}/{result.requests:<4}"
        f" {result.ttft_mean_ms:9.0f} {result.ttft_p99_ms:7.0f}"
        f" {result.tpot_mean_ms:10.1f} {result.tpot_p99_ms:7.1f}"
        f" {result.attainment:9.3f} {result.goodput_rps:10.2f} {result.finetune_tps:14.0f}"
    )


def machine() -> dict[str, Any]:
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    for line in cpuinfo.read_text().splitlines() if cpuinfo.exists() else ():
        if line.startswith("model name"):
            name = line.split(":", 1)[1].strip()
            break
    return {"cpu": name, "cores": len(os.sched_getaffinity(0))}


def last_line(found: dict[str, Any]) -> dict[str, Any]:
    """Per load and system the four figures that decide."""
    return {
        load: {name: {key: result[key] for key in KEYS} for name, result in of_load.items()}
        for load, of_load in found["results"].items()
    }


def timeline(
    answers: Sequence[Answer], updates: Sequence[Update], began: float, seconds: float, slo: Slo
) -> dict[str, Any]:
    """What the plot of the burst shows, on a clock that starts with it."""
    after = [u for u in updates if u.time > began]
    return {
        "seconds": seconds,
        "arrivals_s": [round(a.due - began, 3) for a in answers],
        "answers": [
            {
                "ended_s": round(a.ended - began, 3),
                "tpot_ms": None if a.tpot_s is None else round(a.tpot_s * 1e3, 2),
                "ttft_ms": round(a.ttft_s * 1e3, 1),
                "met": slo.met(a),
            }
            for a in answers
            if a.ended is not None
        ],
        "updates": [{"at_s": round(u.time - began, 3), "tokens": u.tokens} for u in after],
    }


def write(found: dict[str, Any], out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(found, indent=1, allow_nan=True)
    (out / "co_serving.json").write_text(text + "\n")
    import matplotlib

    matplotlib.use("Agg")
    _plot_loads(found, out / "co_serving.png")
    _plot_burst(found, out / "co_serving_burst.png")


def _plot_loads(found: dict[str, Any], path: Path) -> None:
    """Attainment and finetune tokens a second against the offered load."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.2))
    loads = list(found["results"])
    rates = [found["rates_rps"][load] for load in loads]
    for name in found["results"][loads[0]]:
        bold = name in ("inference", "co_serving")
        style = {"marker": "o", "lw": 2.5 if bold else 1.2, "ls": "-" if bold else "--"}
        for ax, key in zip(axes, ("attainment", "finetune_tps"), strict=True):
            ax.plot(
                rates, [found["results"][load][name][key] for load in loads], label=name, **style
            )
    axes[0].set(ylabel="requests that meet both objectives", ylim=(-0.03, 1.03))
    axes[1].set(ylabel="finetune tokens/s")
    axes[1].axhline(found["trainer_alone_tps"], color="grey", ls=":", label="trainer alone")
    for ax in axes:
        ax.set_xlabel("requests/s")
        ax.grid(alpha=0.3)
    axes[1].legend(fontsize=7)
    slo = found["slo"]
    figure.suptitle(
        f"objectives: {slo['tpot_ms']:.0f} ms a token, {slo['ttft_ms'] / 1e3:.1f} s to the first"
    )
    _save(figure, path)


def _plot_burst(found: dict[str, Any], path: Path) -> None:
    """Arrivals, finetune tokens and latency of co-serving through a burst."""
    from matplotlib import pyplot

    burst, slo = found["burst"], found["slo"]
    bins = [i + 0.5 for i in range(math.ceil(burst["seconds"]))]
    per_second = [sum(int(at) == int(b) for at in burst["arrivals_s"]) for b in bins]
    figure, axes = pyplot.subplots(3, 1, figsize=(9, 7), sharex=True)
    axes[0].bar(bins, per_second, width=0.9, color="grey")
    axes[0].set_ylabel("arrivals/s")
    times = [0.0, *(u["at_s"] for u in burst["updates"])]
    paces = [
        u["tokens"] / (u["at_s"] - since) for u, since in zip(burst["updates"], times, strict=False)
    ]
    axes[1].stairs(paces, times, fill=True, alpha=0.6)
    axes[1].set(ylabel="finetune tokens/s", xlim=(0, burst["seconds"]))
    for met, colour in ((True, "tab:green"), (False, "tab:red")):
        shown = [a for a in burst["answers"] if a["met"] == met and a["tpot_ms"] is not None]
        ended, tpot = [a["ended_s"] for a in shown], [a["tpot_ms"] for a in shown]
        label = "both objectives met" if met else "missed"
        axes[2].scatter(ended, tpot, s=10, color=colour, label=label)
    axes[2].axhline(slo["tpot_ms"], color="black", lw=0.8, ls=":")
    axes[2].set(ylabel="ms a token", xlabel="s")
    axes[2].legend(fontsize=8)
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    from matplotlib import pyplot

    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
