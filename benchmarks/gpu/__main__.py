"""Everything that one GPU has to tell, in one command and under ten minutes.

    python -m benchmarks.gpu --out DIR [--data-dir DIR] [--rates 1 5 10 20] [--only PART ...]
    python -m benchmarks.gpu --out DIR --dry-run        # no GPU: a tiny model, times mean nothing

Parts, each in processes of its own and written to DIR/h200-PART.json when it is done: `kernels`
(every kernel against plain torch and the device's ceiling), `trainer` (transformers + peft alone,
at its best batch size), `inference` (plain vLLM) and `co_serving` (idle, then under the same
requests), at shapes of Llama-3.1-8B with dummy weights. `summary` sets them side by side and is
also the last line of output.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu import serving, workload
from benchmarks.gpu.arrivals import Lengths, Traffic
from benchmarks.gpu.workload import LLAMA_8B, TINY

PARTS = ("kernels", "trainer", "inference", "co_serving")
RATES = (1.0, 5.0, 10.0, 20.0)
BF16_FLOP_PER_S = 790e12  # of an H200's dense GEMMs as measured, where `kernels` has not run
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
        if self.arguments.dry_run:
            environment["TRITON_INTERPRET"] = "1"
        self._python("benchmarks.gpu.kernels", "--output", str(out), env=environment)
        return json.loads(out.read_text())

    def trainer(self) -> Record:
        """With and without Liger-Kernel and checkpointing of activations; the fastest counts."""
        model = workload.write_model(self.work / "model", self.size)
        liger = importlib.util.find_spec("liger_kernel") is not None
        ways = {"sdpa": [], "sdpa, checkpointing": ["--checkpointing"]}
        if liger and not self.arguments.dry_run:
            ways["sdpa, liger"] = ["--liger"]
        found = {}
        for name, options in ways.items():
            if self.arguments.dry_run:
                options = [*options, "--tiny", "--steps", "1"]
            said = self._python("benchmarks.gpu.dedicated", str(model), *options)
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

    def run(self) -> int:
        """Run the parts; one that fails is reported and the others go on. Returns how many
        failed."""
        failures = 0
        for part in self.arguments.only:
            started = time.monotonic()
            act: Callable[[], Record] = getattr(self, part)
            try:
                record = act()
            except (serving.DemoError, subprocess.CalledProcessError, OSError) as error:
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
        found["co_serving_tps"] = {r: of["finetune_tps"] for r, of in ours["rates"].items()}
        found["attainment"] = {r: of["attainment"] for r, of in ours["rates"].items()}
        if trainer is not None:
            found["idle_vs_trainer"] = round(found["idle_tps"] / trainer, 3)
            found["co_serving_vs_trainer"] = {
                rate: round(pace / trainer, 3) for rate, pace in found["co_serving_tps"].items()
            }
    for name, record in (("inference", plain), ("co_serving", ours)):
        if record is not None:
            found[f"{name}_tpot_mean_ms"] = {
                r: x["tpot_mean_ms"] for r, x in record["rates"].items()
            }
            found[f"{name}_memory"] = record["memory"]
    return found


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
    arguments.seconds = arguments.seconds or (3.0 if arguments.dry_run else 15.0)
    return arguments


def main() -> None:
    arguments = parse()
    with tempfile.TemporaryDirectory() as folder:
        work = (arguments.work or Path(folder)).resolve()
        work.mkdir(parents=True, exist_ok=True)
        sys.exit(Run(arguments, work).run() and 1)


if __name__ == "__main__":
    main()
