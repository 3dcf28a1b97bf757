"""Plain vLLM and the dedicated trainer as two processes on one GPU: in turns, or at once.

Each has half of the device's memory, for neither could be moved out of it in a turn. What a stopped
process has queued still runs: a step or two of the server, a micro-batch of the trainer.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.co_serving.processes import Trainer
from benchmarks.co_serving.systems import (
    TURNS_S,
    System,
    spatial,
    temporal,
    temporal_when_idle,
)
from benchmarks.gpu import serving, workload
from benchmarks.gpu.serving import GpuServer, Setup

TURN_S = max(TURNS_S)  # a shorter one would end before what was queued in it
MEMORY_SHARE = 0.45  # of the device, for each; the rest is what CUDA itself takes, twice


class DedicatedProcess(Trainer):
    """`benchmarks.gpu.dedicated` in the place of the CPU benchmark's trainer.

    Args:
        options: of the way that it trains, as `--checkpointing`.
    """

    def __init__(self, setup: Setup, log: Path, micro_batch: int, options: Sequence[str]) -> None:
        model = workload.write_model(setup.work / "model", setup.size)
        command = [sys.executable, "-m", "benchmarks.gpu.dedicated", str(model), *options]
        command += ["--log", str(log), "--micro-batch", str(micro_batch)]
        command += ["--memory-share", str(MEMORY_SHARE)]
        self.log, self._errors = log, log.with_suffix(".err")
        log.unlink(missing_ok=True)
        with self._errors.open("wb") as errors:
            self._process = subprocess.Popen(
                command,
                env={**os.environ, **setup.environment},
                stdout=subprocess.DEVNULL,
                stderr=errors,
            )


def shared_by(server: GpuServer, trainer: Trainer) -> list[System]:
    return [
        temporal(TURN_S, server, trainer),
        temporal_when_idle(server, trainer),
        spatial("spatial", server, trainer),
    ]


def measure(
    setup: Setup, rates: Sequence[float], micro_batch: int, options: Sequence[str]
) -> dict[str, Any]:
    with contextlib.ExitStack() as stack:
        share = ("--gpu-memory-utilization", str(MEMORY_SHARE))
        server = stack.enter_context(GpuServer(setup, "shared", *share))
        server.wait_until_ready()
        trainer = DedicatedProcess(setup, setup.work / "trainer.jsonl", micro_batch, options)
        stack.callback(trainer.close)
        found = {"micro_batch": trainer.ready(), "memory_share": MEMORY_SHARE}
        systems = {
            system.name: asyncio.run(serving.under_load(system, setup, rates))
            for system in shared_by(server, trainer)
        }
        memory = {**serving.kv_cache(server), "used_bytes": serving.used_bytes()}
        return {**found, "systems": systems, "memory": memory}
