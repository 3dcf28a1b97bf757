"""What the plugin costs while there is nothing to train, and what its planning costs else.

    python -m benchmarks.overhead [--model DIR] [--rounds 9] [--threads N]

Four engines, each in a process of its own, take turns at the same requests: vLLM as installed
(`plain`), the same without compilation (`eager`) and with `--enable-lora` (`lora`), and with the
plugin on but no job (`plugin`). On CPU vLLM compiles no model that may have adapters, so `eager`
tells how much of a difference that is. A round's ratio is of engines that ran seconds apart; the
overhead is the median over all rounds of `plugin / plain - 1`.

The last line is JSON: {"idle_plugin_overhead": x, "plan_us_p50": y, "plan_us_p99": z}, with the
planner's times from benchmarks/plan_overhead.py.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MODEL_SIZE = "100m"
VOCAB = range(10, 2000)  # ids that mean text in every model of examples/make_model.py
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "eager": {"enforce_eager": True},
    "lora": {"enable_lora": True},
    "plugin": {"additional_config": {"co_finetune": []}},
}


@dataclass(frozen=True)
class Workload:
    """Requests sent at once, with prompts that no engine has seen."""

    requests: int
    prompt_tokens: int
    output_tokens: int


WORKLOADS = {
    "one answer": Workload(1, 16, 48),
    "decode": Workload(16, 16, 32),
    "prefill": Workload(8, 256, 1),
}


def overheads(
    seconds: Mapping[str, Sequence[Mapping[str, float]]], kind: str, against: str
) -> dict[str, float]:
    """Median over rounds of time ratio - 1, by workload, and over all of them as `all`.

    Args:
        seconds: by engine, a list with one entry a round: workload -> seconds.
    """
    pairs = list(zip(seconds[kind], seconds[against], strict=True))
    ratios = {name: [a[name] / b[name] - 1 for a, b in pairs] for name in pairs[0][0]}
    medians = {name: statistics.median(values) for name, values in ratios.items()}
    return {**medians, "all": statistics.median(v for values in ratios.values() for v in values)}


def turn(kinds: Sequence[str], round_: int) -> list[str]:
    """Order of a round: rotated, and every other one backwards, so that none always goes first."""
    at = round_ % len(kinds)
    order = [*kinds[at:], *kinds[:at]]
    return order[::-1] if round_ // len(kinds) % 2 else order


def run_engine(model: str, kind: str) -> None:
    """Child: answer each line of stdin, a round's number, with the seconds by workload."""
    from vllm import LLM, SamplingParams

    llm = LLM(model, dtype="bfloat16", max_model_len=1024, max_num_seqs=32, **KINDS[kind])

    def run_round(seed: int) -> dict[str, float]:
        draw, taken = random.Random(seed), {}
        for name, load in WORKLOADS.items():
            prompts = [
                {"prompt_token_ids": draw.choices(VOCAB, k=load.prompt_tokens)}
                for _ in range(load.requests)
            ]
            sampling = SamplingParams(
                temperature=0.0, max_tokens=load.output_tokens, ignore_eos=True, detokenize=False
            )
            started = time.perf_counter()
            llm.generate(prompts, sampling, use_tqdm=False)
            taken[name] = time.perf_counter() - started
        return taken

    run_round(-1)
    print("ready", flush=True)
    for line in sys.stdin:
        print(json.dumps(run_round(int(line))), flush=True)


class Engine:
    """A child process with one engine."""

    def __init__(self, model: Path, kind: str, work: Path, threads: int) -> None:
        self.kind, self._log = kind, work / f"{kind}.log"
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": str(threads),
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_LOGGING_LEVEL": "WARNING",
            "VLLM_FLEXFT_STATE_DIR": str(work / "state"),
        }
        command = [sys.executable, "-m", "benchmarks.overhead", "--model", str(model)]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [*command, "--engine", kind],
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        self._read(lambda line: line == "ready")

    def run(self, round_: int) -> dict[str, float]:
        assert self._process.stdin is not None
        print(round_, file=self._process.stdin, flush=True)
        return json.loads(self._read(lambda line: line.startswith("{")))

    def close(self) -> None:
        self._process.kill()
        self._process.wait()

    def _read(self, wanted: Any) -> str:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if wanted(line.strip()):
                return line.strip()
        sys.exit(f"engine {self.kind} ended:\n{self._log.read_text()[-3000:]}")


def measure(arguments: argparse.Namespace, work: Path) -> dict[str, list[dict[str, float]]]:
    """Seconds of every round, by engine."""
    engines: dict[str, Engine] = {}
    try:
        for kind in arguments.kinds:
            engines[kind] = Engine(arguments.model, kind, work, arguments.threads)
        seconds: dict[str, list[dict[str, float]]] = {kind: [] for kind in engines}
        for round_ in range(arguments.rounds):
            for kind in turn(arguments.kinds, round_):
                seconds[kind].append(engines[kind].run(round_))
        return seconds
    finally:
        for engine in engines.values():
            engine.close()


def plan_times() -> dict[str, float]:
    """`plan_us_p50` and `plan_us_p99` from the planner's own benchmark."""
    command = [sys.executable, "-m", "benchmarks.plan_overhead"]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"benchmarks.plan_overhead failed:\n{done.stderr[-3000:]}")
    found = json.loads(done.stdout.splitlines()[-1])
    return {key: found[key] for key in ("plan_us_p50", "plan_us_p99")}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, help="default: one of 121 M parameters is made")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 2)
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--engine", choices=list(KINDS), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.engine:
        run_engine(str(arguments.model), arguments.engine)
        return
    with tempfile.TemporaryDirectory() as folder:
        if arguments.model is None:
            from make_model import make_model

            arguments.model = Path(folder) / "model"
            make_model(arguments.model, size=MODEL_SIZE, dtype="bfloat16")
        seconds = measure(arguments, Path(folder))
    print(f"{arguments.rounds} rounds, {arguments.threads} threads; median seconds")
    for kind, rounds in seconds.items():
        medians = {name: statistics.median(r[name] for r in rounds) for name in WORKLOADS}
        print(f"  {kind:7}", "  ".join(f"{name} {value:.3f}" for name, value in medians.items()))
    for kind, against in (("plugin", "plain"), ("plugin", "lora"), ("lora", "plain")):
        if {kind, against} <= seconds.keys():
            found = overheads(seconds, kind, against)
            told = "  ".join(f"{name} {value:+.3f}" for name, value in found.items())
            print(f"  {kind} / {against} - 1:  {told}")
    idle = round(overheads(seconds, "plugin", "plain")["all"], 4)
    print(json.dumps({"idle_plugin_overhead": idle, **plan_times()}))


if __name__ == "__main__":
    main()
