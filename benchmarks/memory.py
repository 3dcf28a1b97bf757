"""What a training step keeps in memory: ours against PEFT's, in measured bytes.

    python -m benchmarks.memory [--quick] [--threads N] [--out benchmarks/results]

Bytes come from a tracker that sees every storage made and freed (live_bytes.py). Two models of
random weights: 110 M parameters at 1,024 tokens for shares and times, and one of two narrow layers
for the growth from 1k to 32k tokens. Steps of the two sides are timed in turn, so that
whatever else the machine does meets both. The tables and a plot go into --out; the last line is
JSON:
  kept_vs_peft          our activations / PEFT's without checkpointing, 1,024 tokens, all-linear,
                        under a budget of SHARE of PEFT's
  kept_vs_checkpointing our activations, least policy / PEFT's with checkpointing
  step_time_vs_peft     our step under that same budget / PEFT's without checkpointing (median of
                        the rounds' ratios)
  plan_vs_measured      largest |`flexft plan` / measured - 1| over all runs
  linear_1k_to_32k      most live bytes of the backward at 32k tokens / (32 x those at 1k)
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

LENGTH = 1024
SHARE = 0.12  # of PEFT's activations: the budget that ours is given
SERVED_GIB = 2.0  # room for two lanes of 2,048 tokens of the 110 M
ROUNDS = 5
LENGTHS = (1024, 2048, 4096, 8192, 16_384, 32_768)
# Two layers, so that PEFT's activations at 32k tokens fit a small machine.
NARROW = dict(hidden_size=256, intermediate_size=768, head_dim=64, max_position_embeddings=40_000)
UPPER = list(range(7, 14))  # of 14 layers
JOBS: dict[str, dict[str, Any]] = {
    "all-linear": {},
    "q_proj, v_proj": {"targets": ["q_proj", "v_proj"]},
    "down_proj": {"targets": ["down_proj"]},
    "all-linear, upper half": {"layers": UPPER},
    "down_proj, upper half": {"targets": ["down_proj"], "layers": UPPER},
}


class Side:
    """A measuring process that answers one JSON line with another."""

    def __init__(self, process: subprocess.Popen[str], name: str) -> None:
        self._process, self._name = process, name

    def ask(self, **request: Any) -> dict[str, Any]:
        pipe_in, pipe_out = self._process.stdin, self._process.stdout
        assert pipe_in is not None
        assert pipe_out is not None
        print(json.dumps(request), file=pipe_in, flush=True)
        for line in pipe_out:
            if line.startswith(ANSWER):
                return json.loads(line.removeprefix(ANSWER))
        sys.exit(f"{self._name} ended at {request}; see its output above")


ANSWER = "answer: "


@contextmanager
def side(kind: str, model: Path, threads: int, max_length: int = LENGTH) -> Iterator[Side]:
    command = [sys.executable, "-m", "benchmarks.memory", "--side", kind, str(model)]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "ERROR",
    }
    with subprocess.Popen(
        [*command, str(max_length)],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield Side(process, kind)
        finally:
            process.kill()


def be_side(kind: str, model: Path, max_length: int) -> None:
    with tempfile.TemporaryDirectory() as work:
        if kind == "engine":
            from benchmarks.memory_engine import EngineSide

            measuring: Any = EngineSide(model, Path(work), max_length)
        else:
            from benchmarks.memory_peft import PeftSide

            measuring = PeftSide(model, checkpointing=kind == "checkpointing")
        for line in sys.stdin:
            print(ANSWER + json.dumps(measuring.answer(json.loads(line))), flush=True)


def at_1024(model: Path, threads: int) -> dict[str, Any]:
    """Shares of PEFT's bytes, step times in turn with PEFT, and what pruning saves."""
    with (
        side("plain", model, threads) as peft,
        side("checkpointing", model, threads) as checkpointing,
        side("engine", model, threads) as engine,
    ):
        one = {"do": "bytes", "length": LENGTH}
        bytes_of = {"PEFT": peft.ask(**one), "PEFT, checkpointing": checkpointing.ask(**one)}
        ours = {
            "fast": engine.ask(**one, policy="fast"),
            "minimal": engine.ask(**one, policy="minimal"),
        }
        # State and working buffers come on top of the activations' share.
        kept = SHARE * bytes_of["PEFT"]["kept"]
        budget = {"memory_gib": (kept + ours["fast"]["planned_other"]) / 2**30, "length": LENGTH}
        ours["auto"] = engine.ask(do="bytes", **budget)
        ours["a server's lanes"] = engine.ask(**one, lanes="served", memory_gib=SERVED_GIB)
        for name, measured in (*bytes_of.items(), *ours.items()):
            print(f"{name:24} {measured}", flush=True)
        times = timed(peft, checkpointing, engine, budget)
        pruning = pruned(engine)
    return {"bytes": {**bytes_of, **ours}, "times": times, "pruning": pruning}


def timed(peft: Side, checkpointing: Side, engine: Side, budget: dict[str, Any]) -> dict[str, Any]:
    plan = engine.ask(do="open", steps=ROUNDS + 1, profile=True, **budget)
    rounds = []
    for _ in range(ROUNDS + 1):
        rounds.append(
            {
                "PEFT": peft.ask(do="step", length=LENGTH)["seconds"],
                "PEFT, checkpointing": checkpointing.ask(do="step", length=LENGTH)["seconds"],
                "ours": engine.ask(do="step")["seconds"],
            }
        )
        print(f"seconds a step: {rounds[-1]}", flush=True)
    del rounds[0]  # warm-up
    ratios = {
        base: statistics.median(one["ours"] / one[base] for one in rounds)
        for base in ("PEFT", "PEFT, checkpointing")
    }
    rate = LENGTH / statistics.median(one["ours"] for one in rounds)
    return {
        "rounds": rounds,
        "ours_vs": ratios,
        "tokens_per_second": rate,
        "planned_tokens_per_second": plan["planned_tokens_per_second"],
        "recomputed_share": plan["recomputed_share"],
    }


def pruned(engine: Side) -> dict[str, Any]:
    """What jobs with fewer adapters keep and how long their steps take, with nothing recomputed."""
    table = {}
    for name, job in JOBS.items():
        measured = engine.ask(do="bytes", length=LENGTH, policy="fast", **job)
        engine.ask(do="open", steps=3, length=LENGTH, policy="fast", **job)
        seconds = min([engine.ask(do="step")["seconds"] for _ in range(3)][1:])
        table[name] = {"kept": measured["kept"], "seconds": seconds, **measured}
        print(f"{name:24} {measured['kept'] / 2**20:8.1f} MiB  {seconds:.2f} s", flush=True)
    return table


def growth(model: Path, lengths: tuple[int, ...], threads: int) -> dict[str, dict[str, Any]]:
    """Variant -> length -> bytes. The ablation adds one step at a time."""
    table: dict[str, dict[str, Any]] = {}
    for name, kind in (("PEFT", "plain"), ("PEFT, checkpointing", "checkpointing")):
        with side(kind, model, threads) as peft:
            for length in lengths:
                table.setdefault(name, {})[str(length)] = peft.ask(do="bytes", length=length)
    with side("engine", model, threads, max(lengths)) as engine:
        for length in lengths:
            whole = {"do": "bytes", "length": length, "window": length}
            steps = {
                "pruned": engine.ask(**whole, policy="fast"),
                "+ rematerialised": engine.ask(**whole, policy="minimal"),
                "+ token windows": engine.ask(do="bytes", length=length, policy="minimal"),
            }
            for name, measured in steps.items():
                table.setdefault(name, {})[str(length)] = measured
            sizes = {name: round(of[str(length)]["peak"] / 2**20, 1) for name, of in table.items()}
            print(f"{length:6} tokens, MiB at the peak: {sizes}", flush=True)
    return table


def plot(result: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    shares = {**result["at_1024"]["bytes"]}
    del shares["a server's lanes"]  # of four times the tokens
    names = {"fast": "pruned", "auto": f"budget of {SHARE:.0%}", "minimal": "least"}
    left.barh(
        [names.get(name, name) for name in shares], [of["kept"] / 2**20 for of in shares.values()]
    )
    left.invert_yaxis()
    left.set_xlabel("MiB kept for the backward, 1,024 tokens, 110 M parameters")
    for name, by_length in result["growth"].items():
        lengths = [int(length) for length in by_length]
        peaks = [by_length[length]["peak"] / 2**20 for length in by_length]
        right.loglog(lengths, peaks, marker="o", label=name)
    right.set_xlabel("tokens")
    right.set_ylabel("MiB at the peak of a step")
    right.set_xticks(lengths, [f"{length // 1024}k" for length in lengths])
    right.minorticks_off()
    right.legend()
    figure.savefig(path, dpi=120)


def summary(result: dict[str, Any]) -> dict[str, float]:
    shares, growth_of = result["at_1024"]["bytes"], result["growth"]
    ours = [shares[name] for name in ("fast", "auto", "minimal", "a server's lanes")]
    ours += result["at_1024"]["pruning"].values()
    for name in ("pruned", "+ rematerialised", "+ token windows"):
        ours += growth_of[name].values()
    windows = growth_of["+ token windows"]
    short, long = min(windows, key=int), max(windows, key=int)
    peak = {length: of["peak"] for length, of in windows.items()}
    return {
        "kept_vs_peft": round(shares["auto"]["kept"] / shares["PEFT"]["kept"], 4),
        "kept_vs_checkpointing": round(
            shares["minimal"]["kept"] / shares["PEFT, checkpointing"]["kept"], 4
        ),
        "step_time_vs_peft": round(result["at_1024"]["times"]["ours_vs"]["PEFT"], 3),
        "plan_vs_measured": round(max(abs(o["planned"] / o["measured"] - 1) for o in ours), 4),
        "linear_1k_to_32k": round(peak[long] / peak[short] * int(short) / int(long), 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="lengths up to 4k in place of 32k")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--side", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        kind, model, max_length = arguments.side
        be_side(kind, Path(model), int(max_length))
        return
    from make_model import make_model

    with tempfile.TemporaryDirectory() as folder:
        large = make_model(Path(folder) / "large", size="100m", dtype="bfloat16")
        narrow = make_model(Path(folder) / "narrow", dtype="bfloat16", **NARROW)
        result: dict[str, Any] = {
            "command": "make bench-memory",
            "machine": f"{platform.machine()}, {arguments.threads} threads",
            "at_1024": at_1024(large, arguments.threads),
            "growth": growth(
                narrow, LENGTHS[:3] if arguments.quick else LENGTHS, arguments.threads
            ),
        }
    result["summary"] = summary(result)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "memory.json").write_text(json.dumps(result, indent=1) + "\n")
    plot(result, arguments.out / "memory.png")
    print(json.dumps(result["summary"]))


if __name__ == "__main__":
    main()
