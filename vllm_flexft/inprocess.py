"""Finetuning with `vllm.LLM` in one's own process: drive the engine until the jobs are done.

A served engine runs its own loop; an `LLM` whose engine core lives in this process
(`VLLM_ENABLE_V1_MULTIPROCESSING=0`) makes steps only while `generate` is called.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from vllm_flexft.jobs.records import JobRecord
from vllm_flexft.jobs.states import FINISHED
from vllm_flexft.jobs.store import JobStore
from vllm_flexft.wiring import CoServeConfig, job_store_path

POLL_S = 0.02


def wait_for_jobs(llm: Any, timeout: float | None = None) -> Sequence[JobRecord]:
    """Return the records of this model's jobs once all have ended, refused ones included.

    What became of each says `record.status`; `record.error` says why it failed or was refused.

    Args:
        llm: a `vllm.LLM` that was created with `additional_config={"co_finetune": ...}`.
        timeout: seconds; None waits for ever.

    Raises:
        ValueError: the engine does not co-serve.
        RuntimeError: the engine takes no jobs any more, as after the job store was found damaged.
        TimeoutError: a job is still queued or running at the timeout.
    """
    vllm_config = llm.llm_engine.vllm_config
    config = CoServeConfig.from_vllm_config(vllm_config)
    if config is None:
        raise ValueError('this engine does not co-serve: pass additional_config={"co_finetune": …}')
    core = getattr(llm.llm_engine.engine_core, "engine_core", None)  # None: it has its own process
    store = JobStore(job_store_path(config.options))
    deadline = None if timeout is None else time.monotonic() + timeout
    named = {(entry.name or entry.source, entry.source) for entry in config.jobs}
    next_look = 0.0
    while True:
        worked = False
        if core is not None and core.scheduler.has_requests():
            core.step_fn()
            worked = True
        now = time.monotonic()
        if now >= next_look or not worked:
            next_look = now + POLL_S
            model = vllm_config.model_config.model
            records = [
                r
                for r in store.list()
                if r.model == model or (r.refused and (r.name, r.source) in named)
            ]
            known = {record.name for record in records}
            taken_in = core is None or core.scheduler.named_jobs_are_in
            ended = all(record.status in FINISHED for record in records)
            if taken_in and ended and all(name in known for name, _ in named):
                return records
        if core is not None and (failure := core.scheduler.finetuning_failure) is not None:
            raise RuntimeError(f"finetuning has stopped: {failure}")
        if deadline is not None and now > deadline:
            raise TimeoutError(f"jobs did not end within {timeout:.0f} s")
        if not worked:
            time.sleep(POLL_S)
