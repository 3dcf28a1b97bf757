"""A server on the GPU, plain or co-serving, under requests: latencies and finetune tokens."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import sys
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from demo_server import DemoError, Server, free_port

from benchmarks.co_serving.client import Replay
from benchmarks.co_serving.measures import Phase, Slo, Update, Window, finetune_tps, summarise
from benchmarks.co_serving.processes import SERVED, job_updates
from benchmarks.co_serving.systems import System, inference_only
from benchmarks.co_serving.trace import Arrival
from benchmarks.gpu import workload
from benchmarks.gpu.arrivals import Traffic
from benchmarks.gpu.workload import Size

SLO = Slo(tpot_s=0.045, ttft_s=5.0)  # of FlexLLM's published figures (arXiv 2402.18789)
LEAD_IN_S = 2.0  # of load before the measured window
GRACE_S = 10.0  # after the last arrival; what runs then is cut off
WARM_UPDATES = 2  # of the optimizer: what is allocated, compiled and fitted at first, is

# Requests sent at once, over and over, to tell two servers without a job apart: their number,
# tokens of prompt and answer.
ROUNDS = {"one": (1, 16, 64), "batch": (32, 128, 64)}
NUM_ROUNDS = 8  # and one before, which is not counted


@dataclass(frozen=True)
class Setup:
    """What all servers of a run share.

    Args:
        dry: on CPU, or on a device that computes nothing: shapes and times are tiny.
        seconds: of each measured window.
    """

    work: Path
    size: Size
    dry: bool
    seconds: float
    traffic: Traffic

    @property
    def environment(self) -> dict[str, str]:
        """Of every process of a run, beside what it inherits."""
        always = {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
        if not self.dry:
            return always
        bound = {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
        return {**always, **bound, "VLLM_CPU_KVCACHE_SPACE": "1"}


class GpuServer(Server):
    """A server of this benchmark; `systems` takes it as it takes the co-serving one's."""

    def __init__(self, setup: Setup, name: str, *options: str) -> None:
        port = free_port()
        log, environment = setup.work / f"{name}.log", setup.environment
        super().__init__(command(setup, port, *options), log, port=port, environment=environment)

    def engine(self) -> list[psutil.Process]:
        """The engine core, and its worker where that is a process: what taking turns stops."""
        return psutil.Process(self._process.pid).children(recursive=True)


def command(setup: Setup, port: int, *options: str) -> list[str]:
    model = workload.write_model(setup.work / "model", setup.size)
    line = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(model)]
    line += ["--load-format", "dummy", "--max-model-len", str(setup.size.max_model_len)]
    line += ["--served-model-name", SERVED, "--host", "127.0.0.1", "--port", str(port)]
    line += ["--no-enable-log-requests", "--disable-uvicorn-access-log"]
    if setup.dry:
        line += ["--max-num-seqs", "16"]
    return [*line, *options]


def co_server(setup: Setup) -> GpuServer:
    """Without a job; `start_job` brings it one."""
    options = {
        "tpot_ms": SLO.tpot_s * 1e3,
        "ttft_ms": SLO.ttft_s * 1e3,
        "state_dir": str(setup.work / "state"),
        "experimental_cuda": True,
    }
    return GpuServer(
        setup, "co_serving", "--co-finetune-config", json.dumps(options), "--co-finetune"
    )


def start_job(setup: Setup) -> Path:
    """Queue a job that trains all the time; returns where it writes."""
    from vllm_flexft.config import FinetuneJob
    from vllm_flexft.jobs.store import JobStore

    output_dir = setup.work / "adapter"
    rows = workload.write_rows(setup.work / "rows.jsonl", setup.size)
    job = FinetuneJob.from_mapping(workload.job(rows, setup.size, output_dir))
    store = JobStore(setup.work / "state" / "jobs.sqlite3")
    try:
        store.submit(job, model=str(setup.work / "model"))
    finally:
        store.close()
    return output_dir


def with_job(server: GpuServer, output_dir: Path) -> System:
    @contextlib.asynccontextmanager
    async def running(replay: Replay) -> AsyncIterator[None]:
        yield

    return System("co_serving", server, running, lambda: job_updates(output_dir))


async def under_load(system: System, setup: Setup, rates: Sequence[float]) -> dict[str, Any]:
    """Rate -> figures of `measures.Result`, by the same arrivals for every system."""
    results = {}
    for rate in rates:
        replay = Replay(system.server.url, SERVED, seed=round(rate * 1000))
        arrivals = setup.traffic.at(rate, LEAD_IN_S + setup.seconds)
        async with system.running(replay):
            began = time.time()
            answers = await replay.run(arrivals, grace_s=GRACE_S, start=began)
        system.server.check()
        window = Window(began, began + LEAD_IN_S, began + LEAD_IN_S + setup.seconds)
        result = summarise([Phase(answers, system.updates(), window)], SLO).as_dict()
        errors = sorted({a.error for a in answers if a.error and a.error != "cut off"})
        cut_off = sum(a.error == "cut off" for a in answers)
        results[f"{rate:g}"] = {**result, "cut_off": cut_off, "errors": errors[:3]}
        print(f"  {system.name}, {rate:g} requests/s: {json.dumps(results[f'{rate:g}'])}")
    return results


async def rounds(server: GpuServer, count: int) -> dict[str, list[float]]:
    """Seconds that each of `ROUNDS` takes, `count` times."""
    replay = Replay(server.url, SERVED)
    found: dict[str, list[float]] = {name: [] for name in ROUNDS}
    for number in range(1 + count):
        for name, (requests, prompt, output) in ROUNDS.items():
            arrivals = [Arrival(0.0, prompt, output, name)] * requests
            started = time.perf_counter()
            answers = await replay.all_at_once(arrivals, at_most_s=60.0)
            taken = time.perf_counter() - started
            if not all(answer.complete for answer in answers):
                raise server.failure(f"requests without a job beside them: {answers[0].error}")
            if number:
                found[name].append(round(taken, 5))
    return found


def idle(server: Server, setup: Setup, output_dir: Path) -> float:
    """Finetune tokens a second without a request.

    Raises:
        DemoError: the job makes no progress.
    """
    deadline = time.monotonic() + 120.0
    while len(updates := job_updates(output_dir)) < WARM_UPDATES:
        server.check()
        if time.monotonic() > deadline:
            raise server.failure("no optimizer update within two minutes")
        time.sleep(0.1)
    start = updates[-1].time
    time.sleep(setup.seconds)
    return finetune_tps(_since(job_updates(output_dir), start), Window(start, start, time.time()))


def _since(updates: Sequence[Update], start: float) -> list[Update]:
    return [update for update in updates if update.time > start]


def measure_plain(setup: Setup, rates: Sequence[float]) -> dict[str, Any]:
    with GpuServer(setup, "plain") as plain:
        plain.wait_until_ready()
        return {
            "rounds": asyncio.run(rounds(plain, NUM_ROUNDS)),
            "rates": asyncio.run(under_load(inference_only(plain), setup, rates)),
            "memory": {**kv_cache(plain), "used_bytes": used_bytes()},
        }


def measure_co_serving(setup: Setup, rates: Sequence[float], ceiling: float) -> dict[str, Any]:
    """Without a job, with one and no request, with one under the requests. What the device has in
    use is told after each: nothing is to be allocated once the job is open."""
    with co_server(setup) as made:
        made.wait_until_ready()
        without_job = asyncio.run(rounds(made, NUM_ROUNDS))
        used = {"without_job": used_bytes()}
        output_dir = start_job(setup)
        tokens_per_second = idle(made, setup, output_dir)
        used["idle"] = used_bytes()
        under = asyncio.run(under_load(with_job(made, output_dir), setup, rates))
        used["after_requests"] = used_bytes()
        return {
            "rounds": without_job,
            "idle": {
                "tokens_per_second": tokens_per_second,
                "mfu": workload.mfu(tokens_per_second, setup.size, ceiling),
            },
            "rates": under,
            "memory": {**kv_cache(made), "used_bytes": used},
        }


def kv_cache(server: Server) -> dict[str, int | None]:
    """Tokens that the server's KV cache holds, as its log says."""
    found = re.findall(r"KV cache size: ([\d,]+) tokens", server.log.read_text(errors="replace"))
    return {"kv_cache_tokens": int(found[-1].replace(",", "")) if found else None}


def used_bytes() -> int | None:
    """In use on the whole device, None without one."""
    from vllm.third_party import pynvml

    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(0)
        return int(pynvml.nvmlDeviceGetMemoryInfo(handle).used)
    except pynvml.NVMLError:
        return None


__all__ = ["SLO", "DemoError", "Setup", "measure_co_serving", "measure_plain"]
