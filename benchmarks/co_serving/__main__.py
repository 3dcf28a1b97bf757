"""Co-serving against its alternatives on the same cores, in the same run, over HTTP.

    python -m benchmarks.co_serving [--data-dir DIR] [--quick]

Requests of the Azure traces go to a real `vllm serve` at three loads, set from what the server can
answer on this machine when it only serves: light, heavy and overload. Under each load run, with the
same requests, the plain server alone; the co-serving one, in which a LoRA job trains; and the plain
server beside a trainer of transformers + peft: in turns (`temporal_*`), or at the same time
(`spatial*`). docs/benchmarks.md tells what each of them is and how the objectives are chosen.

The last line is JSON: per load and system `tpot_p99_ms, ttft_p99_ms, attainment, finetune_tps`.
All figures and the plots are left in --out.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from demo_server import DemoError
from make_model import make_model

from benchmarks.co_serving import calibrate, report, systems
from benchmarks.co_serving.client import Answer, Replay
from benchmarks.co_serving.measures import Phase, Result, Slo, Window, finetune_tps, summarise
from benchmarks.co_serving.processes import (
    SERVED,
    Cores,
    InferenceServer,
    Trainer,
    job_like_the_trainers,
    job_updates,
)
from benchmarks.co_serving.trace import Arrival, read_traces, stretch
from benchmarks.train import rows_from

LOADS = {"light": 0.25, "heavy": 0.5, "overload": 2.0}  # of the measured capacity
PEAK = 0.65  # of it, the load by which the objectives are set
PROBES = 12  # requests without load
BURST = ("light", "overload", "light")  # a third of the time each
GRACE_S = 8.0  # after the last arrival; what runs then is cut off


@dataclass(frozen=True)
class Times:
    """Seconds of each kind of phase."""

    lead_in: float  # of load, before the measured window
    tail: float  # of load, after it: the optimizer step under way at its end is done by then
    main: float  # window of inference alone and of co-serving
    other: float  # window of the baselines
    alone: float  # of the trainer alone
    burst: float
    capacity_requests: int


FULL = Times(5.0, 4.0, main=30.0, other=15.0, alone=15.0, burst=30.0, capacity_requests=64)
QUICK = Times(1.0, 1.0, main=5.0, other=4.0, alone=4.0, burst=9.0, capacity_requests=24)


class Run:
    """One run of the benchmark; processes are closed with `stack`."""

    def __init__(
        self, arguments: argparse.Namespace, work: Path, stack: contextlib.ExitStack
    ) -> None:
        self.arguments, self.work, self._stack = arguments, work, stack
        self.times = QUICK if arguments.quick else FULL
        self.cores = Cores.of(sorted(os.sched_getaffinity(0)))
        os.sched_setaffinity(0, self.cores.host)
        self.trace = read_traces(arguments.data_dir)
        self.model, self.rows = arguments.model, work / "rows.jsonl"
        if self.model is None:
            size = "tiny" if arguments.quick else "100m"
            longest = {"max_position_embeddings": 2048} if arguments.quick else {}
            self.model = make_model(work / "model", size=size, dtype="bfloat16", **longest)
        rows = rows_from(arguments.data_dir, 400)
        self.rows.write_text("".join(json.dumps(row) + "\n" for row in rows))
        self._seed = 0

    # ---- processes

    def server(self, name: str, *options: str) -> InferenceServer:
        log = self.work / f"{name}.log"
        if self.arguments.quick:
            options = ("--enforce-eager", *options)  # compiling takes a minute
        server = InferenceServer(self.model, log, cores=self.cores, options=options)
        self._stack.enter_context(server)
        return server

    def trainer(self, name: str, **options: Any) -> Trainer:
        log = self.work / f"{name}.jsonl"
        trainer = Trainer(self.model, self.rows, log, cores=self.cores.device, **options)
        self._stack.callback(trainer.close)
        return trainer

    def co_server(self, slo: Slo) -> tuple[InferenceServer, Path]:
        """With the same job that the trainer runs, and the run's objectives."""
        output_dir = self.work / "adapter"
        job = job_like_the_trainers(self.rows, output_dir)
        path = self.work / "job.yaml"
        path.write_text(yaml.safe_dump(job))
        options = {
            "tpot_ms": slo.tpot_s * 1e3,
            "ttft_ms": slo.ttft_s * 1e3,
            "state_dir": str(self.work / "state"),
        }
        server = self.server(
            "co_serving",
            "--co-finetune-config",
            json.dumps(options),
            "--co-finetune",
            str(path),
        )
        server.wait_until_ready()
        while len(job_updates(output_dir)) < 2:  # what is allocated and tuned at first, is
            server.check()
            time.sleep(0.2)
        server.pause()
        return server, output_dir

    # ---- traffic

    def replay(self, server: InferenceServer) -> Replay:
        self._seed += 1
        return Replay(server.url, SERVED, seed=self._seed)

    async def phase(
        self, system: systems.System, arrivals: Sequence[Arrival], lead_in: float, seconds: float
    ) -> tuple[list[Answer], Window]:
        """Run `arrivals` through a system; the window opens after `lead_in`."""
        length = lead_in + seconds + self.times.tail
        replay = self.replay(system.server)
        async with system.running(replay):
            began = time.time()
            answers = await replay.run(arrivals, grace_s=GRACE_S, start=began)
            await asyncio.sleep(max(0.0, began + length - time.time()))
        return answers, Window(began, began + lead_in, began + lead_in + seconds)

    async def under(self, system: systems.System, load: str, rate: float, seconds: float) -> Phase:
        """A system under a load; a shorter window has the first of the same arrivals."""
        times = self.times
        total = times.lead_in + times.main + times.tail
        end = times.lead_in + seconds + times.tail
        arrivals = [a for a in stretch(self.trace, rate, total, skip=500) if a.at_s < end]
        answers, window = await self.phase(system, arrivals, times.lead_in, seconds)
        system.server.check()
        errors = sorted({a.error for a in answers if a.error and a.error != "cut off"})
        if errors:
            raise DemoError(f"{system.name} under {load} load: {'; '.join(errors[:3])}")
        return Phase(answers, system.updates(), window)

    def told(self, name: str, load: str, phases: Sequence[Phase], slo: Slo) -> Result:
        result = summarise(phases, slo)
        print(report.row(load, name, result), flush=True)
        return result

    @staticmethod
    def order(load: str, only: systems.System, ours: systems.System) -> list[systems.System]:
        """Who runs when: where the two are compared to a few percent, neither is always first, and
        a machine that becomes slower meanwhile is so for both."""
        return [only, ours, ours, only] if load == "overload" else [only, ours]

    async def burst(self, system: systems.System, capacity: float, slo: Slo) -> dict[str, Any]:
        """A timeline of co-serving: light, overload, light."""
        third, arrivals = self.times.burst / len(BURST), []
        for i, load in enumerate(BURST):
            part = stretch(self.trace, LOADS[load] * capacity, third, skip=2000 + 500 * i)
            arrivals += [
                Arrival(a.at_s + i * third, a.prompt_tokens, a.output_tokens, a.source)
                for a in part
            ]
        answers, window = await self.phase(system, arrivals, 0.0, self.times.burst)
        return report.timeline(answers, system.updates(), window.began, self.times.burst, slo)

    async def trainer_alone(self, trainer: Trainer) -> float:
        trainer.go()
        began = time.time()
        await asyncio.sleep(self.times.alone)
        window = Window(began, began, time.time())
        await asyncio.sleep(self.times.alone / 4)  # the step under way ends after the window
        trainer.stop()
        return finetune_tps(trainer.updates(), window)

    # ---- the run

    async def run(self) -> dict[str, Any]:
        plain = self.server("plain")
        plain.wait_until_ready()
        trainer = self.trainer("trainer")
        micro_batch = trainer.ready()
        niced = self.trainer("niced", micro_batch=micro_batch, nice=True)
        niced.ready()
        alone = await self.trainer_alone(trainer)
        unloaded = await calibrate.unloaded(self.replay(plain), stretch(self.trace, 1.0, PROBES))
        at_once = stretch(self.trace, 1.0, self.times.capacity_requests, skip=100)
        capacity = await calibrate.capacity(self.replay(plain), at_once)
        rates = {load: share * capacity for load, share in LOADS.items()}
        only = systems.inference_only(plain)
        peak = await self.under(only, "peak", PEAK * capacity, self.times.main)
        slo = calibrate.objectives(peak.answers, peak.window)
        print(
            f"trainer alone {alone:.0f} tokens/s (micro-batch {micro_batch}); capacity "
            f"{capacity:.2f} requests/s; objectives {slo.tpot_s * 1e3:.0f} ms a token, "
            f"{slo.ttft_s:.1f} s to the first",
            flush=True,
        )
        co_server, output_dir = self.co_server(slo)
        ours = systems.co_serving(co_server, output_dir)
        others = [
            *(systems.temporal(turn, plain, trainer) for turn in systems.TURNS_S),
            systems.temporal_when_idle(plain, trainer),
            systems.spatial("spatial", plain, trainer),
            systems.spatial("spatial_nice", plain, niced),
        ]
        print(report.HEADER, flush=True)
        results: dict[str, dict[str, Result]] = {}
        for load, rate in rates.items():
            phases: dict[str, list[Phase]] = {only.name: [], ours.name: []}
            for system in self.order(load, only, ours):
                phases[system.name].append(await self.under(system, load, rate, self.times.main))
            for system in others:
                phases[system.name] = [await self.under(system, load, rate, self.times.other)]
            results[load] = {
                name: self.told(name, load, of_system, slo) for name, of_system in phases.items()
            }
        return {
            "machine": report.machine(),
            "model": json.loads((self.model / "make_model.json").read_text()),
            "capacity_rps": capacity,
            "rates_rps": rates,
            "unloaded": unloaded,
            "slo": {"tpot_ms": slo.tpot_s * 1e3, "ttft_ms": slo.ttft_s * 1e3},
            "trainer_alone_tps": alone,
            "peft_micro_batch": micro_batch,
            "results": {
                load: {name: result.as_dict() for name, result in of_load.items()}
                for load, of_load in results.items()
            },
            "burst": await self.burst(ours, capacity, slo),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data-dir", type=Path, default=os.environ.get("VLLM_FLEXFT_DATA"))
    parser.add_argument("--model", type=Path, help="default: one of 121 M parameters is made")
    parser.add_argument("--quick", action="store_true", help="tiny model, short phases: a trial")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--work", type=Path, help="keep logs here")
    arguments = parser.parse_args()
    if arguments.data_dir is None:
        parser.error("the Azure traces are needed: give --data-dir or VLLM_FLEXFT_DATA")
    arguments.data_dir = Path(arguments.data_dir)
    started = time.monotonic()
    for ended in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(ended, lambda *_: sys.exit("bench-coserve: stopped"))  # and the servers too
    with contextlib.ExitStack() as stack:
        work = arguments.work or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        work.mkdir(parents=True, exist_ok=True)
        try:
            found = asyncio.run(Run(arguments, work.resolve(), stack).run())
        except (DemoError, FileNotFoundError, ValueError) as error:
            sys.exit(f"bench-coserve: {error}")
    found["minutes"] = round((time.monotonic() - started) / 60, 1)
    report.write(found, arguments.out)
    print(json.dumps(report.last_line(found)))


if __name__ == "__main__":
    main()
