"""`vllm serve` as a real subprocess, and a light process that only trains, both to be killed."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

START_TIMEOUT_S = 280.0
# One thread each, unbound: several engines of a test run share the cores.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
}
# What a training process would import: two thirds of its start-up time.
PRELOAD = [
    "peft",
    "vllm.entrypoints.llm",
    "vllm.model_executor.model_loader",
    "vllm.model_executor.models.llama",
    "vllm.v1.engine.core",
    "vllm.v1.executor.uniproc_executor",
    "vllm.v1.worker.cpu_worker",
    "vllm_flexft.runner.worker",
    "vllm_flexft.sched.scheduler",
]
MODEL_OPTIONS = ("--dtype", "float32", "--max-model-len", "512", "--max-num-seqs", "16")
MODEL_OPTIONS += ("--enforce-eager",)  # compiling takes longer than most tests


class Server:
    """One run of `vllm serve`, in a process group of its own; output goes to `log`."""

    def __init__(self, model: Path, *options: str, log: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.model, self.log = model, log
        command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(model)]
        command += [*MODEL_OPTIONS, "--host", "127.0.0.1", "--port", str(self.port), *options]
        environment = {k: v for k, v in os.environ.items() if k != "VLLM_PLUGINS"} | ENVIRONMENT
        environment.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                command,
                env=environment,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                cwd=log.parent,
            )

    def wait_until_up(self, timeout: float = START_TIMEOUT_S) -> Server:
        deadline = time.monotonic() + timeout
        while not self.is_up():
            assert self.process.poll() is None, f"the server ended:\n{self.log_text()[-3000:]}"
            assert time.monotonic() < deadline, f"not up in time:\n{self.log_text()[-3000:]}"
            time.sleep(0.1)
        return self

    def is_up(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5) as reply:
                return bool(reply.status == 200)
        except OSError:
            return False

    @property
    def client(self) -> Any:
        from openai import OpenAI

        return OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", api_key="none", max_retries=0)

    def models(self) -> list[str]:
        return [model.id for model in self.client.models.list().data]

    def complete(self, prompt: str, model: str | None = None, max_tokens: int = 24) -> str:
        """Greedy."""
        reply = self.client.completions.create(
            model=model or str(self.model),
            prompt=prompt,
            max_tokens=max_tokens,
            temperature=0.0,
            extra_body={"ignore_eos": True},
        )
        return str(reply.choices[0].text)

    def log_text(self) -> str:
        return self.log.read_text(errors="replace")

    def our_lines(self) -> list[str]:
        """Messages of vllm-flexft, as "LEVEL message"."""
        ours = (
            "reporter|feed|intake|lease|scheduler|admission|wiring|adapters|trainer|writer|metrics"
        )
        pattern = rf"^(?:\(.*?\) )?(\w+) \S+ \S+ \[(?:{ours})\.py:\d+\] (.*)$"
        found = re.findall(pattern, self.log_text(), flags=re.MULTILINE)
        return [f"{level} {message}" for level, message in found]

    def terminate(self, timeout: float = 60.0) -> float:
        """SIGTERM to the server, as a service manager sends it; seconds until all is gone."""
        family = self._family()
        started = time.monotonic()
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(timeout)
        _, alive = psutil.wait_procs(family, timeout=timeout)
        assert not alive, f"left behind: {alive}"
        return time.monotonic() - started

    def kill(self) -> None:
        """SIGKILL to API server, engine core and workers at once; returns when all are gone."""
        family = self._family()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        psutil.wait_procs(family, timeout=60)

    def kill_api_server(self, timeout: float = 60.0) -> float:
        """SIGKILL to the process that was started, and no other; seconds until all are gone."""
        family = self._family()
        started = time.monotonic()
        self.process.kill()
        self.process.wait()
        _, alive = psutil.wait_procs(family, timeout=timeout)
        assert not alive, f"left behind: {alive}"
        return time.monotonic() - started

    def _family(self) -> list[psutil.Process]:
        try:
            return list(psutil.Process(self.process.pid).children(recursive=True))
        except psutil.NoSuchProcess:
            return []


class TrainingProcess:
    """The engine of `vllm.LLM` in a process of its own: scheduler, feed, trainer and store as in a
    server, up in three seconds. For tests that need many restarts.

    It is forked from a process that has vLLM imported and runs no thread yet.
    """

    def __init__(
        self, model: Path, state_dir: Path, jobs: Sequence[Mapping[str, Any]], log: Path
    ) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        self.log = log
        self.process = context.Process(
            target=_train, args=(str(model), str(state_dir), list(jobs), str(log))
        )
        self.process.start()

    def kill(self) -> None:
        self.process.kill()
        self.process.join()

    def wait(self, timeout: float = 280.0) -> int:
        """Exit code; 0 when all jobs have ended."""
        self.process.join(timeout)
        code = self.process.exitcode
        if code is None:
            self.kill()
            raise AssertionError(f"still running:\n{self.log.read_text()[-3000:]}")
        return code


def _train(model: str, state_dir: str, jobs: list[Mapping[str, Any]], log: str) -> None:
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(output, stream)
    os.environ.update(ENVIRONMENT, VLLM_ENABLE_V1_MULTIPROCESSING="0")
    import torch
    from vllm import LLM

    from vllm_flexft.inprocess import wait_for_jobs

    torch.set_num_threads(1)  # torch was loaded before the environment was set
    llm = LLM(
        model,
        dtype="float32",
        max_model_len=512,
        max_num_seqs=16,
        enforce_eager=True,
        additional_config={
            "co_finetune": jobs,
            "co_finetune_config": {"state_dir": state_dir},
        },
    )
    wait_for_jobs(llm, timeout=240)
    os._exit(0)
