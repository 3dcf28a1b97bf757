"""Our side of benchmarks/memory.py: jobs of one sequence a step in a real engine."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from benchmarks.live_bytes import LiveBytes
from benchmarks.memory_peft import LINEARS, LORA
from vllm_flexft.graph.windows import WINDOW

KV_CACHE_BYTES = 2**29
ALL_AT_ONCE_MS = 1e7  # nothing else is served: a whole backward may fit one engine step


class EngineSide:
    def __init__(self, model: Path, work: Path, max_length: int) -> None:
        from vllm import LLM

        from vllm_flexft.graph import job_memory
        from vllm_flexft.jobs.store import JobStore
        from vllm_flexft.train.trainer import Trainer

        # One sequence at a time, as PEFT has it, unless asked for the lanes of a server.
        self._served_lanes = job_memory.SERVED_LANES
        job_memory.SERVED_LANES = job_memory.Lanes(1, 1)
        self._model, self._work = model, work
        options = {"state_dir": str(work / "state"), "ttft_ms": ALL_AT_ONCE_MS}
        self._llm = LLM(
            str(model),
            dtype="bfloat16",
            max_model_len=max_length + 64,
            max_num_seqs=4,
            kv_cache_memory_bytes=KV_CACHE_BYTES,
            additional_config={"co_finetune": [], "co_finetune_config": options},
        )
        self._core = self._llm.llm_engine.engine_core.engine_core
        self._store = JobStore(work / "state/jobs.sqlite3")
        self._names = (f"job-{i}" for i in itertools.count())
        self._name: str | None = None
        self._updates = 0
        update = Trainer._update

        def counted(trainer: Trainer, step: Any) -> float:
            self._updates += 1
            return update(trainer, step)

        Trainer._update = counted  # type: ignore[method-assign]

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        if request["do"] == "step":
            return self._step()
        self._until(self._over)  # the job before
        if request["do"] == "bytes":
            return self._bytes(request)
        self._open(request, request["steps"])
        return self._plan(request)

    def _bytes(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Live bytes that one step of a job adds to the engine.

        `kept`: the arena; `working`: what else of the backward lives between two of its slices;
        `peak`: the most of both at any moment of the backward; `measured`: all that the job holds
        between slices, with the adapter's parameters, gradients and moments.
        """
        tracker, seen = LiveBytes(), dict.fromkeys(("live", "peak"), 0)
        with pytest.MonkeyPatch.context() as patch:
            _watch(patch, tracker, seen)
            if request.get("lanes") == "served":
                patch.setattr("vllm_flexft.graph.job_memory.SERVED_LANES", self._served_lanes)
            if request.get("window"):
                patch.setitem(WINDOW, "cpu", request["window"])
            self._open(request, 1)
            with tracker:
                self._until(lambda: self._updates == 1)
            planned = self._plan(request)
        self._until(self._over)
        return {
            "kept": seen["kept"],
            "working": seen["live"] - seen["kept"] - seen["state"],
            "peak": seen["peak"] - seen["state"],
            "measured": seen["live"] + seen["moments"],
            **planned,
        }

    def _plan(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """The same job through `flexft plan`."""
        from transformers import AutoConfig

        from vllm_flexft.cli.sizing import measured_flops, plan_job
        from vllm_flexft.config import FinetuneJob
        from vllm_flexft.graph.ops import ModelShape

        made = plan_job(
            ModelShape.from_hf_config(AutoConfig.from_pretrained(self._model)),
            FinetuneJob.from_mapping(self._job(request, 1)),
            dtype="bfloat16",
            budget_gib=request.get("memory_gib") or math.inf,
            policy=request.get("policy", "auto"),
        )
        answer: dict[str, Any] = {
            "planned": made.taken,
            "planned_other": made.working + made.state,
            "recomputed_share": made.recomputed_share,
        }
        if request.get("profile"):
            answer["planned_tokens_per_second"] = (
                measured_flops(made.shape, "bfloat16") / made.work.total
            )
        return answer

    def _open(self, request: Mapping[str, Any], steps: int) -> None:
        from vllm_flexft.config import FinetuneJob, ServerOptions

        scheduler = self._core.scheduler
        changes = {
            "activation_policy": request.get("policy", "auto"),
            "memory_gib": request.get("memory_gib"),
        }
        config = scheduler._co_serve
        options = config.options.model_copy(update=changes)
        scheduler._co_serve = dataclasses.replace(config, options=options)
        limits = dataclasses.replace(
            scheduler._engine_limits, activation_policy=options.activation_policy
        )
        scheduler._engine_limits = scheduler._feed._admission._limits = limits
        self._updates = 0
        defaults = ServerOptions.from_mapping({"state_dir": str(self._work / "state")})
        job = FinetuneJob.from_mapping(self._job(request, steps)).with_output_dir(defaults)
        self._name = job.name
        self._store.submit(job, model=str(self._model))

    def _job(self, request: Mapping[str, Any], steps: int) -> dict[str, Any]:
        length = request["length"]
        return {
            "name": next(self._names),
            "dataset": {
                "path": str(self._rows(length)),
                "max_length": length,
                "shuffle": False,
            },
            "peft": {
                **LORA,
                "target_modules": request.get("targets", LINEARS),
                "layers_to_transform": request.get("layers"),
            },
            "training": {"max_steps": steps, "train_batch_size": 1, "save_steps": 10**6},
        }

    def _rows(self, length: int) -> Path:
        """One text of at least `length` tokens; the job cuts it to exactly that."""
        import random

        import sample_text

        path = self._work / f"rows-{length}.jsonl"
        if not path.exists():
            tokenizer, rng = self._llm.get_tokenizer(), random.Random(0)
            pieces: list[str] = []
            size = 0
            while size < 2 * length:  # a whole text has fewer tokens than its pieces
                pieces.append(" ".join(sample_text.question_and_answer(rng)))
                size += len(tokenizer(pieces[-1], add_special_tokens=False)["input_ids"])
            path.write_text(json.dumps({"text": " ".join(pieces)}) + "\n")
        return path

    def _step(self) -> dict[str, Any]:
        """Seconds of one training step, from its first chunk to its update."""
        before, started = self._updates, time.perf_counter()
        self._until(lambda: self._updates > before)
        return {"seconds": time.perf_counter() - started}

    def _over(self) -> bool:
        if self._name is None:
            return True
        record = self._store.get(self._name)
        if record.status == "failed":
            raise RuntimeError(record.error)
        return record.status == "succeeded"

    def _until(self, done: Callable[[], bool]) -> None:
        while not done():
            if self._core.scheduler.has_requests():
                self._llm.llm_engine.step()
            else:
                self._over()
                time.sleep(0.002)


def _watch(patch: pytest.MonkeyPatch, tracker: LiveBytes, seen: dict[str, int]) -> None:
    """Fill `seen` as the job goes through its stages; the forward between them is vLLM's."""
    from vllm_flexft.train.backward import MicroBatchBackward
    from vllm_flexft.train.trainer import Trainer

    construct, begin, update = Trainer.__init__, Trainer.begin, Trainer._update
    run_slice = MicroBatchBackward._run_slice

    def opened(self: Trainer, *args: Any, **kwargs: Any) -> None:
        before = tracker.total
        construct(self, *args, **kwargs)
        seen["held"] = tracker.total - before
        seen["kept"] = self.store.num_bytes
        seen["state"] = self.adapter.master.nbytes + self.adapter.grad.nbytes

    def begun(self: Trainer, batches: Any) -> None:
        before = tracker.total
        begin(self, batches)
        seen["held"] += tracker.total - before

    def sliced(self: MicroBatchBackward, part: Any) -> None:
        first = seen.setdefault("first", tracker.total)
        tracker.peak = tracker.total
        run_slice(self, part)
        seen["live"] = max(seen["live"], seen["held"] + tracker.total - first)
        seen["peak"] = max(seen["peak"], seen["held"] + tracker.peak - first)

    def updated(self: Trainer, step: Any) -> float:
        before = tracker.total
        norm = update(self, step)
        seen["moments"] = tracker.total - before
        return norm

    patch.setattr(Trainer, "__init__", opened)
    patch.setattr(Trainer, "begin", begun)
    patch.setattr(MicroBatchBackward, "_run_slice", sliced)
    patch.setattr(Trainer, "_update", updated)
