"""A real vLLM engine in the test's own process, and jobs run on it."""

from __future__ import annotations

import itertools
import os
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")


class CoServingEngine:
    """`vllm.LLM` with co-serving on; jobs go through the real job store, one after another."""

    def __init__(
        self,
        model: Path,
        state_dir: Path,
        *,
        dtype: str = "float32",
        options: Mapping[str, Any] | None = None,
        **llm_options: Any,
    ) -> None:
        from vllm import LLM

        from vllm_flexft.jobs.store import JobStore
        from vllm_flexft.sched import retirement

        retirement.GRACE_S = 0.0  # there is no API server that has to see a withdrawal
        self.model, self.state_dir = model, state_dir
        self.llm = LLM(
            str(model),
            dtype=dtype,
            # Compiling takes longer than most tests; test_compiled.py does it.
            **{"max_model_len": 512, "max_num_seqs": 16, "seed": 0, "enforce_eager": True}
            | llm_options,
            additional_config={
                "co_finetune": [],
                "co_finetune_config": {"state_dir": str(state_dir), **(options or {})},
            },
        )
        # vLLM's finalizer also tears down the groups that all engines of the process share, and
        # several modules keep an engine of their own.
        self.llm.llm_engine.engine_core._finalizer.detach()
        weakref.finalize(self, self.scheduler._feed.stop)
        self.store = JobStore(state_dir / "jobs.sqlite3")
        self._names = (f"job-{i}" for i in itertools.count())

    @property
    def core(self) -> Any:
        return self.llm.llm_engine.engine_core.engine_core

    @property
    def scheduler(self) -> Any:
        return self.core.scheduler

    def submit(self, job: Mapping[str, Any]) -> str:
        """Queue a job and return its name."""
        from vllm_flexft.config import FinetuneJob, ServerOptions

        name = job.get("name") or next(self._names)
        options = ServerOptions.from_mapping({"state_dir": str(self.state_dir)})
        full = FinetuneJob.from_mapping({**job, "name": name}).with_output_dir(options)
        self.store.submit(full, model=str(self.model))
        self.scheduler._feed.look()  # jobs of a test take less than the feed's poll interval
        return name

    def run(self, job: Mapping[str, Any], timeout: float = 240.0) -> Path:
        """Train a job to its end; returns its output folder. Fails if the job does."""
        from vllm_flexft.inprocess import wait_for_jobs

        name = self.submit(job)
        wait_for_jobs(self.llm, timeout)
        record = self.store.get(name)
        assert record.status == "succeeded", record.error
        return record.job().output_dir
