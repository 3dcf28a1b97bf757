"""The server and the trainer as processes that can be stopped, continued and bound to cores."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
from demo_server import Server, free_port

from benchmarks.co_serving.measures import Update
from benchmarks.co_serving.trainer import read_log
from benchmarks.train import BATCH, MAX_LENGTH, PEFT

NICE = 19
# A step of so many tokens at most: chunked prefill then delays the answers of others by no more
# than a few decode steps. The same for every server here.
MAX_BATCHED_TOKENS = 128
MODEL_OPTIONS = ("--dtype", "bfloat16", "--max-model-len", "2048", "--max-num-seqs", "32")
SERVED = "base"


@dataclass(frozen=True)
class Cores:
    """Who computes where: what a GPU and its host are elsewhere.

    Args:
        device: of the model's forward and of training, one thread each.
        host: of the API server, the engine core and the client. vLLM reserves a core for these
            by itself, since the engine core polls: beside it on one core no step has a steady
            time.
    """

    device: tuple[int, ...]
    host: tuple[int, ...]

    @classmethod
    def of(cls, cores: Sequence[int]) -> Cores:
        return cls(tuple(cores[:-1] or cores), tuple(cores[-1:]))


class InferenceServer(Server):
    """`vllm serve`, its worker on `cores.device`."""

    def __init__(
        self, model: Path, log: Path, *, cores: Cores, options: Sequence[str] = ()
    ) -> None:
        self._cores = cores
        port = free_port()
        command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(model)]
        command += [*MODEL_OPTIONS, "--max-num-batched-tokens", str(MAX_BATCHED_TOKENS)]
        command += ["--served-model-name", SERVED, "--host", "127.0.0.1", "--port", str(port)]
        command += ["--no-enable-log-requests", "--disable-uvicorn-access-log", *options]
        environment = {
            "OMP_NUM_THREADS": str(len(cores.device)),
            "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores.device)),
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_SERVER_DEV_MODE": "1",  # /pause and /resume
            "VLLM_LOGGING_LEVEL": "INFO",
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
        }
        super().__init__(command, log, port=port, environment=environment)

    def engine(self) -> list[psutil.Process]:
        """The engine core and its worker, without the API server."""
        return psutil.Process(self._process.pid).children(recursive=True)

    def pause(self) -> None:
        """No more steps, neither of inference nor of finetuning."""
        httpx.post(f"{self.url}/pause", params={"mode": "keep"}, timeout=60).raise_for_status()

    def resume(self) -> None:
        httpx.post(f"{self.url}/resume", timeout=60).raise_for_status()

    def wait_until_ready(self) -> None:
        super().wait_until_ready()
        server = psutil.Process(self._process.pid)
        for process in (server, *self.engine()):
            works = any("Worker" in word for word in process.cmdline())
            for thread in process.threads():
                with contextlib.suppress(ProcessLookupError):
                    os.sched_setaffinity(
                        thread.id, self._cores.device if works else self._cores.host
                    )


class Trainer:
    """The peft trainer as a process, stopped (SIGSTOP) whenever it is not its turn."""

    def __init__(
        self,
        model: Path,
        rows: Path,
        log: Path,
        *,
        cores: Sequence[int],
        micro_batch: int | None = None,
        nice: bool = False,
    ) -> None:
        command = [sys.executable, "-m", "benchmarks.co_serving.trainer"]
        command += [str(model), str(rows), str(log), "--threads", str(len(cores))]
        if micro_batch is not None:
            command += ["--micro-batch", str(micro_batch)]
        self.log, self._errors = log, log.with_suffix(".err")
        log.unlink(missing_ok=True)

        def prepare() -> None:
            if nice:
                os.nice(NICE)
            os.sched_setaffinity(0, cores)

        with self._errors.open("wb") as errors:
            self._process = subprocess.Popen(
                command,
                env={**os.environ, "OMP_NUM_THREADS": str(len(cores))},
                stdout=subprocess.DEVNULL,
                stderr=errors,
                preexec_fn=prepare,
            )

    def ready(self) -> int:
        """Wait for the first optimizer step, then stop; returns the micro-batch size."""
        while not self._has_stepped():
            if self._process.poll() is not None:
                raise RuntimeError(f"the trainer ended:\n{self._errors.read_text()[-3000:]}")
            time.sleep(0.2)
        self.stop()
        micro_batch, _ = read_log(self.log)
        assert micro_batch is not None
        return micro_batch

    def updates(self) -> list[Update]:
        return read_log(self.log)[1]

    def _has_stepped(self) -> bool:
        """Into the second step: the update comes after the log line of its last micro-batch."""
        micro_batch, done = read_log(self.log)
        return micro_batch is not None and len(done) > -(-BATCH // micro_batch)

    def stop(self) -> None:
        self._process.send_signal(signal.SIGSTOP)

    def go(self) -> None:
        self._process.send_signal(signal.SIGCONT)

    def close(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        self._process.wait()


def job_like_the_trainers(rows: Path, output_dir: Path) -> dict[str, Any]:
    """A job that makes the trainer's optimizer steps, more of them than any run waits for."""
    return {
        "name": "bench",
        "dataset": {"path": str(rows), "max_length": MAX_LENGTH, "shuffle": False},
        "peft": PEFT,
        "training": {
            "max_steps": 100_000,
            "train_batch_size": BATCH,
            "save_steps": 100_000,
            "lr_scheduler_type": "constant",
        },
        "output_dir": str(output_dir),
    }


def job_updates(output_dir: Path) -> list[Update]:
    """Optimizer updates of a co-serving job, from its metrics.jsonl."""
    path = output_dir / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    steps = [json.loads(line) for line in lines if line.endswith("\n")]
    found, before = [], 0
    for step in steps:
        if "num_input_tokens" in step:
            found.append(Update(step["time"], step["num_input_tokens"] - before))
            before = step["num_input_tokens"]
    return found
