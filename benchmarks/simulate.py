"""Co-serving on machines and under loads that are not at hand: the real scheduler on a plant.

    python -m benchmarks.simulate [--seconds 30] [--rows 1000000]

vLLM's scheduler with ours on top, with its planner, its latency model and a job of a million queued
samples, runs as in a server; only the worker is played, by a roofline of the machine with noise
(simulation/plant.py). It knows nothing of the plant but the step times. Steady loads of 1 to 50
requests a second on an H200 with an 8B Llama, and on two CPU cores with 121 M parameters; then a
load that steps from 1 to 20 requests a second. Lengths are log-normal, of ShareGPT's means.

The last line is JSON; figures and plot are left in --out.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.bare_scheduler import BLOCK, BareEngine, prepared_job
from benchmarks.simulation.engine import SimulatedRequest, Simulation, StepRecord, Workload
from benchmarks.simulation.plant import CPU, H200, LLAMA_8B, SMALL, Machine, Plant, Shape


@dataclass(frozen=True)
class Setting:
    """A machine, a model, objectives, and lengths of requests.

    Args:
        max_num_batched_tokens: of a step: prefill in chunks that the TPOT objective has room for.
        prompt_tokens, output_tokens: means.
    """

    name: str
    machine: Machine
    shape: Shape
    tpot_ms: float
    ttft_ms: float
    max_num_seqs: int
    max_num_batched_tokens: int
    prompt_tokens: int
    output_tokens: int
    rates: tuple[float, ...]


# Objectives as in FlexLLM's published notebook, on a faster machine: 45 ms and 5 s there.
H200_8B = Setting(
    "H200, Llama 8B", H200, LLAMA_8B, 40.0, 2000.0, 256, 1024, 220, 200, (1, 2, 5, 10, 20, 35, 50)
)
CPU_SMALL = Setting(
    "2 cores, 121 M", CPU, SMALL, 60.0, 2000.0, 32, 128, 150, 40, (0.25, 0.5, 1, 1.5, 2, 3)
)
WARM_S = 5.0  # not measured: the latency model learns, the batch fills
MEAN_ROW_TOKENS = 200  # of a training sequence
RUN = 5  # steps; TPOT is a mean over a request's tokens, and an answer has more than so many
SIGMA = 0.7  # of the lengths' logarithm


def lengths(draw: random.Random, mean: float, most: int) -> int:
    return max(2, min(most, round(draw.lognormvariate(math.log(mean) - SIGMA**2 / 2, SIGMA))))


def arrivals(
    setting: Setting, spans: Sequence[tuple[float, float]], seed: int
) -> list[SimulatedRequest]:
    """Poisson arrivals; `spans` are (requests a second, seconds), one after another."""
    draw, found, began = random.Random(seed), [], 0.0
    for rate, seconds in spans:
        at = began + draw.expovariate(rate)
        while at < began + seconds:
            prompt = lengths(draw, setting.prompt_tokens, 2000)
            found.append(SimulatedRequest(at, prompt, lengths(draw, setting.output_tokens, 1000)))
            at += draw.expovariate(rate)
        began += seconds
    return found


def simulate(
    setting: Setting,
    spans: Sequence[tuple[float, float]],
    *,
    rows: int,
    seed: int = 0,
    **plant: Any,
) -> Simulation:
    """Run a load to its end. `rows` 0: without a job."""
    machine, shape = setting.machine, setting.shape
    with tempfile.TemporaryDirectory() as folder:
        engine = BareEngine(
            Path(folder),
            blocks=int(machine.kv_bytes / shape.kv_bytes / BLOCK),
            model=shape.config(),
            device=machine.device,
            options={"tpot_ms": setting.tpot_ms, "ttft_ms": setting.ttft_ms},
            max_model_len=4096,
            max_num_seqs=setting.max_num_seqs,
            max_num_batched_tokens=setting.max_num_batched_tokens,
            enable_prefix_caching=False,
        )
        if rows:
            of_rows = np.random.default_rng(0).integers(40, 2 * MEAN_ROW_TOKENS - 40, rows)
            endless = {"train_batch_size": 8, "max_steps": 10**6, "save_steps": 10**9}
            engine.train(prepared_job(of_rows, Path(folder) / "out", **endless))
        plant_of = Plant(machine, shape, seed=seed, **plant)
        simulation = Simulation(engine, plant_of, Workload(shape))
        simulation.run(arrivals(setting, spans, seed), sum(seconds for _, seconds in spans))
        return simulation


def excess(
    steps: Sequence[StepRecord], tpot_s: float, since: float, window: int
) -> list[tuple[int, float]]:
    """Where finetuning keeps requests from their TPOT: each run of `window` steps with requests,
    from `since` on, whose mean time is above the objective although inference alone would be
    below. A run is named by the number of its last step, counted from 1; with its mean."""
    after = [step for step in steps if step.start >= since and step.inference_tokens]
    found = []
    for stop in range(window, len(after) + 1):
        run = after[stop - window : stop]
        mean = statistics.fmean(step.seconds for step in run)
        if mean > tpot_s >= statistics.fmean(step.inference_seconds for step in run):
            found.append((stop, mean))
    return found


def figures(simulation: Simulation, setting: Setting, seconds: float) -> dict[str, float]:
    """Of everything after WARM_S."""
    steps = [step for step in simulation.steps if step.start >= WARM_S]
    loaded = [step for step in steps if step.inference_tokens]
    tpots, met = [], []
    for arrival, times in simulation.answers():
        if arrival.at_s < WARM_S or arrival.at_s > seconds - WARM_S or len(times) < 2:
            continue
        tpot = (times[-1] - times[0]) / (len(times) - 1)
        tpots.append(tpot)
        met.append(
            tpot <= setting.tpot_ms / 1e3 and times[0] - arrival.at_s <= setting.ttft_ms / 1e3
        )
    tokens = sum(step.trained_tokens for step in steps)
    return {
        "tpot_mean_ms": 1e3 * statistics.fmean(tpots) if tpots else math.nan,
        "tpot_p99_ms": 1e3 * statistics.quantiles(tpots, n=100)[-1] if len(tpots) > 1 else math.nan,
        "attainment": statistics.fmean(met) if met else math.nan,
        "finetune_tps": tokens / (seconds - WARM_S),
        "late_share": len(excess(loaded, setting.tpot_ms / 1e3, 0.0, RUN)) / max(1, len(loaded)),
        "steps": len(steps),
    }


def sweep(setting: Setting, seconds: float, rows: int) -> list[dict[str, float]]:
    """Figures at each rate, with the job and without."""
    found = []
    for rate in setting.rates:
        began = time.monotonic()
        # Fewer requests a second need longer for as many requests.
        span = max(seconds, min(120.0, 60 / rate)) + 2 * WARM_S
        both = [simulate(setting, [(rate, span)], rows=n) for n in (rows, 0)]
        ours, alone = (figures(s, setting, span) for s in both)
        row = {"rate": rate, **ours, "alone_attainment": alone["attainment"]}
        row["alone_tpot_p99_ms"] = alone["tpot_p99_ms"]
        found.append({key: round(value, 4) for key, value in row.items()})
        print(
            f"{setting.name:16} {rate:5.2f} req/s  TPOT {ours['tpot_mean_ms']:5.1f} mean "
            f"{ours['tpot_p99_ms']:5.1f} p99 ms (alone {alone['tpot_p99_ms']:5.1f})  attained "
            f"{ours['attainment']:.3f} (alone {alone['attainment']:.3f})  finetune "
            f"{ours['finetune_tps']:7.0f} tokens/s  late {ours['late_share']:.4f}  "
            f"[{time.monotonic() - began:.0f} s]",
            flush=True,
        )
    return found


def load_step(setting: Setting, rows: int, before: float = 1.0, after: float = 20.0) -> Simulation:
    """20 s at `before` requests a second, then 10 s at `after`; a plant with noise, no stalls."""
    return simulate(setting, [(before, 20.0), (after, 10.0)], rows=rows, stalls=0.0)


def plot(sweeps: dict[str, Any], step: Simulation, setting: Setting, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 2, figsize=(11, 7))
    for ax, (name, rows) in zip(axes[0], sweeps.items(), strict=True):
        rates = [row["rate"] for row in rows]
        ax.plot(rates, [row["finetune_tps"] for row in rows], "o-", label="finetune tokens/s")
        ax.set(title=name, xlabel="requests/s", ylabel="finetune tokens/s")
        other = ax.twinx()
        other.plot(rates, [row["attainment"] for row in rows], "s--", color="tab:green")
        other.plot(rates, [row["alone_attainment"] for row in rows], ":", color="grey")
        other.set(ylabel="attainment (dotted: without job)", ylim=(0, 1.05))
    near = [s for s in step.steps if 18.0 <= s.start <= 24.0]
    times = [s.start for s in near]
    axes[1][0].plot(times, [s.seconds * 1e3 for s in near], ".", ms=3, label="step")
    alone = [s.inference_seconds * 1e3 for s in near]
    axes[1][0].plot(times, alone, ".", ms=2, color="grey", label="of it inference")
    axes[1][0].axhline(setting.tpot_ms, color="black", lw=0.8, ls=":")
    axes[1][0].set(title="1 to 20 requests/s at 20 s", xlabel="s", ylabel="ms")
    axes[1][0].legend(fontsize=8)
    axes[1][1].plot(times, [s.finetune_tokens for s in near], ".", ms=3, label="forward tokens")
    axes[1][1].plot(times, [s.slices for s in near], ".", ms=3, label="backward slices")
    axes[1][1].set(title="finetune work of a step", xlabel="s")
    axes[1][1].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=30.0, help="measured, at each rate")
    parser.add_argument("--rows", type=int, default=1_000_000, help="queued samples")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    arguments = parser.parse_args()
    sweeps = {s.name: sweep(s, arguments.seconds, arguments.rows) for s in (H200_8B, CPU_SMALL)}
    step = load_step(H200_8B, arguments.rows)
    late = excess(step.steps, H200_8B.tpot_ms / 1e3, 20.0, RUN)
    found = {"sweeps": sweeps, "load_step_settled_after": max((n for n, _ in late), default=0)}
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "simulate.json").write_text(json.dumps(found, indent=1) + "\n")
    plot(sweeps, step, H200_8B, arguments.out / "simulate.png")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
