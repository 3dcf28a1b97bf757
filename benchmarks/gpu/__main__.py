"""Everything that one GPU has to tell, in one command and under ten minutes.

    python -m benchmarks.gpu --out DIR [--data-dir DIR] [--rates 1 5 20] [--only PART ...]
    python -m benchmarks.gpu --out DIR --dry-run        # no GPU: a tiny model, times mean nothing

Parts, each in processes of its own and written to DIR/h200-PART.json when it is done, at shapes of
Llama-3.1-8B with dummy weights where nothing else is said:

    kernels      every kernel against plain torch and the device's ceiling
    trainer      transformers + peft alone, at its best batch size
    inference    plain vLLM
    co_serving   with this plugin: without a job, with one, and with one under the requests
    sharing      plain vLLM beside the trainer as two processes: in turns, and at once
    checks       gradients against PEFT's, requests' tokens, CUDA graphs; small models (tests/gpu)

`summary` sets them side by side and is also the last line of output. The seconds that it is laid
out for, guesses until it has run: kernels 35, trainer 65, inference 120 (60 to start, 17 a rate),
co_serving 180 (80 to start, 30 idle, 22 a rate), sharing 140 (55 to start, 14 a system and rate),
checks 60.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import checks, serving, sharing, workload
from benchmarks.gpu.arrivals import Lengths, Traffic
from benchmarks.gpu.workload import LLAMA_8B, TINY

PARTS = ("kernels", "trainer", "inference", "co_serving", "sharing", "checks")
RATES = (1.0, 5.0, 20.0)
SHARING_RATES = (5.0, 20.0)  # of those
SHARING_WINDOW = 0.6  # of the others' window: three systems share what two would take
BF16_FLOP_PER_S = 790e12  # of an H200's dense GEMMs as measured, where `kernels` has not run
WAYS: dict[str, list[str]] = {  # of the trainer: options of benchmarks.gpu.dedicated
    "sdpa": [],
    "sdpa, checkpointing": ["--checkpointing"],
    "sdpa, liger": ["--liger"],
}
TOLD = ("attainment", "goodput_rps", "tpot_mean_ms", "tpot_p99_ms", "ttft_p99_ms", "finetune_tps")
Record = dict[str, Any]


class Run:
    def __init__(self, arguments: argparse.Namespace, work: Path) -> None:
        self.arguments, self.work = arguments, work
        dry = arguments.dry_run
        self.size = TINY if dry else LLAMA_8B
        traffic = (
            Traffic(None, Lengths(20, 0.5, 64), Lengths(6, 0.5, 16))
            if dry
            else Traffic(arguments.data_dir)
        )
        self.setup = serving.Setup(
            work=work, size=self.size, dry=dry, seconds=arguments.seconds, traffic=traffic
        )
        self.records: dict[str, Record] = {}

    def kernels(self) -> Record:
        out = self.work / "kernels.json"
        environment = dict(os.environ)
        if not torch.cuda.is_available():
            environment["TRITON_INTERPRET"] = "1"
        self._python("benchmarks.gpu.kernels", "--output", str(out), env=environment)
        return json.loads(out.read_text())

    def trainer(self) -> Record:
        """With and without Liger-Kernel and checkpointing of activations; the fastest counts."""
        model = workload.write_model(self.work / "model", self.size)
        liger = importlib.util.find_spec("liger_kernel") is not None
        ways = dict(WAYS)
        if not liger or self.arguments.dry_run:
            del ways["sdpa, liger"]
        found = {}
        for name, options in ways.items():
            said = self._python("benchmarks.gpu.dedicated", str(model), *options, *self._tiny())
            found[name] = json.loads(said.splitlines()[-1])
        paces = {name: of["best_tokens_per_second"] for name, of in found.items()}
        best = max(paces, key=lambda name: paces[name])
        return {"ways": found, "best": best, "tokens_per_second": paces[best]}

    def inference(self) -> Record:
        return serving.measure_plain(self.setup, self.arguments.rates)

    def co_serving(self) -> Record:
        measured = self.records.get("kernels", {}).get("ceiling", {})
        ceiling = measured.get("flop_per_s", BF16_FLOP_PER_S)
        return serving.measure_co_serving(self.setup, self.arguments.rates, ceiling)

    def sharing(self) -> Record:
        """The trainer goes the way, and begins with the micro-batch, that was its best alone."""
        trainer = self.records.get("trainer", {})
        best = trainer.get("best", "sdpa, checkpointing")
        ways = trainer.get("ways", {})
        micro_batch = ways[best]["best_micro_batch"] if ways else max(self.size.micro_batches)
        rates = [rate for rate in self.arguments.rates if rate in SHARING_RATES]
        setup = dataclasses.replace(self.setup, seconds=SHARING_WINDOW * self.setup.seconds)
        options = [*WAYS[best], *self._tiny()]
        return sharing.measure(setup, rates or self.arguments.rates, micro_batch, options)

    def checks(self) -> Record:
        return checks.run(self.work, dry=self.arguments.dry_run)

    def _tiny(self) -> list[str]:
        return ["--tiny"] if self.arguments.dry_run else []

    def run(self) -> int:
        """Run the parts; one that fails is reported and the others go on. Returns how many
        failed."""
        failures = 0
        for part in self.arguments.only:
            started = time.monotonic()
            act: Callable[[], Record] = getattr(self, part)
            try:
                record = act()
            except (RuntimeError, subprocess.CalledProcessError, OSError) as error:
                print(f"{part}: {error}", file=sys.stderr, flush=True)
                failures += 1
                record = {"error": str(error)[-2000:]}
            else:
                self.records[part] = record
            record["seconds"] = round(time.monotonic() - started, 1)
            self._write(part, record)
            print(f"{part}: {record['seconds']} s", flush=True)
        found = summary(self.records)
        self._write("summary", found)
        print(json.dumps(found))
        return failures

    def _write(self, part: str, record: Record) -> None:
        prefix = "dry" if self.arguments.dry_run else "h200"
        self.arguments.out.mkdir(parents=True, exist_ok=True)
        path = self.arguments.out / f"{prefix}-{part}.json"
        about = {"slo_ms": [serving.SLO.tpot_s * 1e3, serving.SLO.ttft_s * 1e3], **versions()}
        about["requests"] = self.setup.traffic.source
        path.write_text(json.dumps({**about, **record}, indent=1) + "\n")

    def _python(self, module: str, *options: str, env: dict[str, str] | None = None) -> str:
        command = [sys.executable, "-m", module, *options]
        env = {**(env or os.environ), **self.setup.environment}
        done = subprocess.run(command, env=env, check=False, capture_output=True, text=True)
        if done.returncode:
            raise serving.DemoError(f"{module} failed:\n{done.stderr[-3000:]}")
        return done.stdout


def versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("vllm", "torch", "triton", "transformers", "peft")}


def summary(records: dict[str, Record]) -> Record:
    """The figures that the goals are stated in; what was not measured is left out."""
    found: Record = {}
    trainer = records.get("trainer", {}).get("tokens_per_second")
    ours, plain = records.get("co_serving"), records.get("inference")
    if trainer is not None:
        found["trainer_tps"] = round(trainer, 1)
    if ours is not None:
        found["idle_tps"] = round(ours["idle"]["tokens_per_second"], 1)
        found["idle_mfu"] = round(ours["idle"]["mfu"], 4)
        if trainer is not None:
            found["idle_vs_trainer"] = round(found["idle_tps"] / trainer, 3)
            found["co_serving_vs_trainer"] = {
                rate: round(of["finetune_tps"] / trainer, 3) for rate, of in ours["rates"].items()
            }
    if ours is not None and plain is not None:
        found["plugin_without_job"] = overheads(ours["rounds"], plain["rounds"])
    of_system = {
        name: record["rates"]
        for name, record in (("inference", plain), ("co_serving", ours))
        if record is not None
    }
    of_system |= records.get("sharing", {}).get("systems", {})
    if of_system:
        found["systems"] = {
            name: {rate: {key: of[key] for key in TOLD} for rate, of in rates.items()}
            for name, rates in of_system.items()
        }
    found["memory"] = {
        part: records[part]["memory"] for part in PARTS if "memory" in records.get(part, {})
    }
    if trainer is not None:
        ways = records["trainer"]["ways"]
        found["memory"]["trainer"] = {name: way["peak_bytes"] for name, way in ways.items()}
    if "checks" in records:
        found["checks"] = {key: records["checks"][key] for key in ("passed", "failed", "skipped")}
    return {key: value for key, value in found.items() if value != {}}


def overheads(
    ours: Mapping[str, Sequence[float]], plain: Mapping[str, Sequence[float]]
) -> dict[str, dict[str, float]]:
    """By kind of round, the ratio of the medians less one; and how far the middle half of the
    rounds of both spreads: a difference smaller than that is none."""

    def spread(seconds: Sequence[float]) -> float:
        low, middle, high = statistics.quantiles(seconds, n=4)
        return (high - low) / middle

    return {
        name: {
            "overhead": round(
                statistics.median(ours[name]) / statistics.median(plain[name]) - 1, 4
            ),
            "spread": round(max(spread(ours[name]), spread(plain[name])), 4),
        }
        for name in plain
    }


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--dry-run", action="store_true", help="tiny model; needs no GPU")
    parser.add_argument("--data-dir", type=Path, help="of the Azure traces; default: synthetic")
    parser.add_argument("--rates", type=float, nargs="+", help="requests a second")
    parser.add_argument("--seconds", type=float, help="of a measured window")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--work", type=Path, help="keep logs here")
    arguments = parser.parse_args(words)
    arguments.rates = arguments.rates or ([2.0] if arguments.dry_run else list(RATES))
    arguments.seconds = arguments.seconds or (3.0 if arguments.dry_run else 10.0)
    return arguments


def main() -> None:
    arguments = parse()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that servers are stopped too
    with tempfile.TemporaryDirectory() as folder:
        work = (arguments.work or Path(folder)).resolve()
        work.mkdir(parents=True, exist_ok=True)
        sys.exit(Run(arguments, work).run() and 1)


if __name__ == "__main__":
    main()
