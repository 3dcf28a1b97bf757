"""A server on the GPU, plain or co-serving, under requests: latencies and finetune tokens."""

from __future__ import annotations

import asyncio
import json
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from demo_server import DemoError, Server, free_port

from benchmarks.co_serving.client import Replay
from benchmarks.co_serving.measures import Slo, Update, Window, finetune_tps, summarise
from benchmarks.co_serving.processes import job_updates
from benchmarks.gpu import workload
from benchmarks.gpu.arrivals import Traffic
from benchmarks.gpu.workload import Size

SERVED = "base"
SLO = Slo(tpot_s=0.045, ttft_s=5.0)  # of FlexLLM's published figures (arXiv 2402.18789)
LEAD_IN_S = 3.0  # of load before the measured window
GRACE_S = 8.0  # after the last arrival; what runs then is cut off
WARM_UPDATES = 2  # of the optimizer: what is allocated, compiled and fitted at first, is


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


def command(setup: Setup, port: int, *options: str) -> list[str]:
    model = workload.write_model(setup.work / "model", setup.size)
    line = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(model)]
    line += ["--load-format", "dummy", "--max-model-len", str(setup.size.max_model_len)]
    line += ["--served-model-name", SERVED, "--host", "127.0.0.1", "--port", str(port)]
    line += ["--no-enable-log-requests", "--disable-uvicorn-access-log"]
    if setup.dry:
        line += ["--max-num-seqs", "16"]
    return [*line, *options]


def server(setup: Setup, name: str, *options: str) -> Server:
    port = free_port()
    environment = {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    if setup.dry:
        environment |= {"VLLM_CPU_KVCACHE_SPACE": "1"}
    log = setup.work / f"{name}.log"
    return Server(command(setup, port, *options), log, port=port, environment=environment)


def co_server(setup: Setup) -> tuple[Server, Path]:
    """With a job that trains all the time, and where it writes."""
    output_dir = setup.work / "adapter"
    rows = workload.write_rows(setup.work / "rows.jsonl", setup.size)
    path = setup.work / "job.json"
    path.write_text(json.dumps(workload.job(rows, setup.size, output_dir)))
    options = {
        "tpot_ms": SLO.tpot_s * 1e3,
        "ttft_ms": SLO.ttft_s * 1e3,
        "state_dir": str(setup.work / "state"),
        "experimental_cuda": True,
    }
    given = ["--co-finetune-config", json.dumps(options), "--co-finetune", str(path)]
    return server(setup, "co_serving", *given), output_dir


async def under_load(
    server: Server, setup: Setup, rates: Sequence[float], output_dir: Path | None
) -> dict[str, Any]:
    """Rate -> figures of `measures.Result`; `output_dir`: of the job that trains meanwhile."""
    results = {}
    for rate in rates:
        replay = Replay(server.url, SERVED, seed=round(rate * 1000))
        arrivals = setup.traffic.at(rate, LEAD_IN_S + setup.seconds)
        began = time.time()
        answers = await replay.run(arrivals, grace_s=GRACE_S, start=began)
        server.check()
        window = Window(began, began + LEAD_IN_S, began + LEAD_IN_S + setup.seconds)
        updates = job_updates(output_dir) if output_dir is not None else []
        result = summarise(answers, updates, window, SLO).as_dict()
        errors = sorted({a.error for a in answers if a.error and a.error != "cut off"})
        results[f"{rate:g}"] = {**result, "errors": errors[:3]}
        print(f"  {rate:g} requests/s: {json.dumps(results[f'{rate:g}'])}", flush=True)
    return results


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
    with server(setup, "plain") as plain:
        plain.wait_until_ready()
        memory = device_memory(plain)
        return {"memory": memory, "rates": asyncio.run(under_load(plain, setup, rates, None))}


def measure_co_serving(setup: Setup, rates: Sequence[float], ceiling: float) -> dict[str, Any]:
    made, output_dir = co_server(setup)
    with made:
        made.wait_until_ready()
        tokens_per_second = idle(made, setup, output_dir)
        memory = device_memory(made)
        return {
            "idle": {
                "tokens_per_second": tokens_per_second,
                "mfu": workload.mfu(tokens_per_second, setup.size, ceiling),
            },
            "memory": memory,
            "rates": asyncio.run(under_load(made, setup, rates, output_dir)),
        }


def device_memory(server: Server) -> dict[str, int | None]:
    """Bytes in use on the whole device, None without one, and tokens that the KV cache holds."""
    found = re.findall(r"KV cache size: ([\d,]+) tokens", server.log.read_text(errors="replace"))
    tokens = int(found[-1].replace(",", "")) if found else None
    return {"used_bytes": _used_bytes(), "kv_cache_tokens": tokens}


def _used_bytes() -> int | None:
    from vllm.third_party import pynvml

    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(0)
        return int(pynvml.nvmlDeviceGetMemoryInfo(handle).used)
    except pynvml.NVMLError:
        return None


__all__ = ["SLO", "DemoError", "Setup", "measure_co_serving", "measure_plain"]
