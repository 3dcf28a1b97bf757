"""vLLM's scheduler with finetuning in what it leaves over.

Each step vLLM schedules inference as if alone; then finetune work is appended to its output. See
design notes in docs/architecture.md.
"""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from vllm.lora.request import LoRARequest
from vllm.sampling_params import SamplingParams
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.output import NewRequestData, SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.outputs import ModelRunnerOutput

from flexft_patches import engine_loop
from vllm_flexft.config import SLOConfig
from vllm_flexft.graph.job_memory import Lanes
from vllm_flexft.graph.ops import ModelShape
from vllm_flexft.plan import PLAN_ATTRIBUTE, RESULT_ATTRIBUTE, StepPlan, StepResult
from vllm_flexft.sched.admission import EngineLimits
from vllm_flexft.sched.costs import UnitCosts
from vllm_flexft.sched.feed import JobFeed
from vllm_flexft.sched.orphan import end_with_parent
from vllm_flexft.sched.planner import DEFAULT_TPOT_MS, DEFAULT_TTFT_MS, Planner, StepLoad
from vllm_flexft.sched.prepared import PreparedJob
from vllm_flexft.sched.progress import EndRecord, WrittenRecord
from vllm_flexft.sched.run import FinetuneRun, Limits, PlannedWork, Room
from vllm_flexft.sched.run_set import RunSet
from vllm_flexft.sched.sequence_kv import KVLender
from vllm_flexft.wiring import TRAINING_LORA_ID_BASE, CoServeConfig, base_model, memory_budget

logger = logging.getLogger("vllm.flexft")

WINDOW = 256  # tokens of a backward window: large enough for efficient GEMMs
MIN_LANE_TOKENS = 2048
NUM_LANES = 2  # the next micro-batch's forward may overlap the last slices of this one
RESERVED_BLOCKS_SHARE = 0.05  # of the KV cache, never lent to finetuning
# A micro-batch needs all its blocks at once: it finds them beside steady requests only while it is
# small against the cache.
MICRO_BATCH_KV_SHARE = 0.25


if TYPE_CHECKING:
    from vllm.v1.core.sched.scheduler import Scheduler as _SchedulerBase
else:
    _SchedulerBase = object


class CoServeMixin(_SchedulerBase):
    """Adds finetuning to a vLLM scheduler class; inference scheduling is vLLM's, untouched."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        engine_loop.install()
        super().__init__(*args, **kwargs)
        config = CoServeConfig.from_vllm_config(self.vllm_config)
        assert config is not None, "co-serving scheduler without co-serving configuration"
        self._co_serve = config
        # Requests may use the user's LoRA slots; the training slots are private.
        self.lora_config = copy.copy(self.vllm_config.lora_config)
        self.lora_config.max_loras = config.serving_max_loras
        self._costs = UnitCosts.from_hf_config(self.vllm_config.model_config.hf_text_config)
        num_blocks = self.cache_config.num_gpu_blocks
        reserved_blocks = int(num_blocks * RESERVED_BLOCKS_SHARE)
        self._lender = KVLender(self.kv_cache_manager, reserved_blocks)
        # One block is vLLM's null block. Each KV-cache group takes its own blocks of a sequence.
        num_groups = len(self.kv_cache_config.kv_cache_groups)
        self._lendable_blocks = (num_blocks - 1 - reserved_blocks) // num_groups
        self._give_way_to_inference()
        self._runs = RunSet()
        self._closing: list[StepPlan] = []
        self._jobs_opened = 0
        self._chunks_in_flight: list[str] = []
        self._planner = Planner.for_objectives(*self._objectives())
        self._started_at: dict[int, tuple[float, StepLoad, float]] = {}
        self._engine_running: Callable[[], bool] = lambda: True
        limits = EngineLimits(
            max_model_len=self.max_model_len,
            kv_tokens=self._lendable_blocks * self.block_size,
            max_lora_rank=self.lora_config.max_lora_rank,
            rank_was_given=config.rank_was_given,
            shape=ModelShape.from_hf_config(self.vllm_config.model_config.hf_text_config),
            itemsize=self.vllm_config.model_config.dtype.itemsize,
            activation_policy=config.options.activation_policy,
            memory_bytes=lambda: memory_budget(
                self._co_serve.options, self.vllm_config.device_config.device_type
            ),
            jobs_at_once=config.options.max_jobs_at_once,
        )
        self._engine_limits = limits
        self._feed = JobFeed(config, self.vllm_config.model_config, limits)
        self._feed.start()

    def bind_engine(self, wake: Callable[[], None], is_running: Callable[[], bool]) -> None:
        """From the engine's process: how to wake its loop, and whether it is shutting down."""
        end_with_parent()
        self._feed.wake = wake
        self._engine_running = is_running

    @property
    def named_jobs_are_in(self) -> bool:
        """Whether the jobs named at start are in the store by now."""
        return self._feed.named_jobs_are_in.is_set()

    @property
    def finetuning_failure(self) -> str | None:
        """Why no job will be trained any more; None while jobs are taken."""
        return self._feed.failure

    # ---- vLLM's interface

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        self.finished_req_ids.update(self._chunks_in_flight)
        self._chunks_in_flight = []
        output: SchedulerOutput = super().schedule(*args, **kwargs)
        if self._feed.retirement.pending:
            self._feed.retirement.in_use = self._adapters_in_use()
        load = StepLoad(
            num_tokens=output.total_num_scheduled_tokens,
            num_running=len(self.running),
            num_waiting=len(self.waiting),
        )
        units = 0.0
        if self._may_finetune():
            units = self._append_finetuning(output, load)
        self._started_at[id(output)] = (time.monotonic(), load, units)
        return output

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> Any:
        if (begun := self._started_at.pop(id(scheduler_output), None)) is not None:
            started, load, units = begun
            self._planner.observe(load, units, time.monotonic() - started)
        for result in getattr(model_runner_output, RESULT_ATTRIBUTE, ()):
            if (run := self._runs.get(result.job_id)) is not None:
                try:
                    self._take_result(run, result)
                except Exception as error:
                    self._fail(run, error)
        return super().update_from_output(scheduler_output, model_runner_output)

    def has_requests(self) -> bool:
        if super().has_requests():
            return True
        return self._may_finetune() and bool(self._runs or self._closing or self._feed.has_ready())

    def reset_prefix_cache(self, *args: Any, **kwargs: Any) -> bool:
        self._release_all()
        return super().reset_prefix_cache(*args, **kwargs)

    def set_pause_state(self, pause_state: PauseState) -> None:
        super().set_pause_state(pause_state)
        if pause_state != PauseState.UNPAUSED:
            self._release_all()

    def shutdown(self) -> None:
        self._feed.stop()
        super().shutdown()

    # ---- finetuning

    def _adapters_in_use(self) -> frozenset[str]:
        """Folders of the adapters that unfinished requests name."""
        named = (request.lora_request for request in self.requests.values())
        return frozenset(lora.lora_path for lora in named if lora is not None)

    def _may_finetune(self) -> bool:
        return self._pause_state == PauseState.UNPAUSED and self._engine_running()

    def _append_finetuning(self, output: SchedulerOutput, load: StepLoad) -> float:
        """Add finetune work to a scheduled step; returns its units. Never raises: an error in
        planning fails the job, not the engine."""
        while (prepared := self._feed.take()) is not None:
            self._start(prepared)
        plans, self._closing = self._closing, []
        closing = {plan.job_id for plan in plans}
        room = Room(
            units=self._planner.budget(load),
            tokens=self.max_num_scheduled_tokens - output.total_num_scheduled_tokens,
            rows=self.scheduler_config.max_num_seqs - len(output.num_scheduled_tokens),
            idle=load.num_tokens == 0 and load.num_waiting == 0,
            sole_job=len(self._runs) == 1,
        )
        work: dict[str, float] = {}
        for run in self._runs.in_turn():
            if run.job_id in closing:
                continue  # submitted again; its next run opens when the worker closed this one
            spent = room.spent
            try:
                plan = self._plan_run(run, room, output)
            except Exception as error:
                self._fail(run, error)
                continue
            if plan is not None:
                plans.append(plan)
            if run.short_of_blocks:
                room.may_begin = False
            elif spent == 0.0 or room.spent > spent:  # else others had left it nothing
                work[run.job_id] = room.spent - spent
        self._runs.charge(work)
        if plans:
            setattr(output, PLAN_ATTRIBUTE, tuple(plans))
        return room.spent

    def _plan_run(self, run: FinetuneRun, room: Room, output: SchedulerOutput) -> StepPlan | None:
        if self._feed.is_cancelled(run.job_id):
            self._end(run, EndRecord(cancelled=True))
            return None
        taken = run.plan(room, self._lender, lambda: self._runs.yield_blocks_to(run, self._lender))
        if taken is None:
            return None
        plan, work = taken
        self._append_chunks(output, run, work)
        return plan

    def _append_chunks(self, output: SchedulerOutput, run: FinetuneRun, work: PlannedWork) -> None:
        """Each chunk is a request of its own that lives for one step: a part of a longer prompt
        whose earlier keys and values are in its blocks already."""
        lora = LoRARequest(
            lora_name=f"flexft-training-{run.lora_id}",
            lora_int_id=run.lora_id,
            lora_path="(in training)",
        )
        for chunk, (prompt, computed, block_ids) in zip(work.chunks, work.prompts, strict=True):
            output.scheduled_new_reqs.append(
                NewRequestData(
                    req_id=chunk.req_id,
                    prompt_token_ids=prompt,
                    mm_features=[],
                    sampling_params=SamplingParams(temperature=0.0, max_tokens=1),
                    pooling_params=None,
                    block_ids=block_ids,
                    num_computed_tokens=computed,
                    lora_request=lora,
                    prefill_token_ids=prompt if self.use_v2_model_runner else None,
                )
            )
            output.num_scheduled_tokens[chunk.req_id] = chunk.num_tokens
            output.total_num_scheduled_tokens += chunk.num_tokens
            self._chunks_in_flight.append(chunk.req_id)
        if (fresh := self._get_new_block_ids_to_zero()) is not None:
            output.new_block_ids_to_zero = [*(output.new_block_ids_to_zero or ()), *fresh]

    def _start(self, prepared: PreparedJob) -> None:
        self._jobs_opened += 1
        num_jobs = self._co_serve.options.max_jobs_at_once
        memory_bytes = self._engine_limits.memory_bytes()
        lanes = self._engine_limits.job_memory(prepared.job).lanes_within(
            Lanes(NUM_LANES, MIN_LANE_TOKENS), prepared.longest, memory_bytes
        )
        limits = Limits(
            window=WINDOW,
            lane_tokens=lanes.tokens,
            num_lanes=lanes.count,
            max_rows=self._co_serve.options.max_rows_in_flight,
            lowest_layer=prepared.lowest_layer,
            kv_blocks=int(self._lendable_blocks * min(MICRO_BATCH_KV_SHARE, 0.5 / num_jobs)),
            block_size=self.block_size,
            activation_policy=self._co_serve.options.activation_policy,
            memory_bytes=memory_bytes,
        )
        # a new number for each opening: vLLM must never take one adapter for another
        lora_id = TRAINING_LORA_ID_BASE + self._jobs_opened
        try:
            self._runs.add(
                FinetuneRun(prepared, limits, self._costs, base_model(self.vllm_config), lora_id)
            )
            self._planner.set_objectives(*self._objectives())
        except Exception as error:
            logger.exception("finetune job %s cannot start", prepared.job.name)
            self._feed.report(prepared, EndRecord(error=f"{type(error).__name__}: {error}"))

    def _take_result(self, run: FinetuneRun, result: StepResult) -> None:
        if result.error is not None:
            self._end(run, EndRecord(error=result.error))
            return
        records = run.on_result(result)
        for record in records:
            self._feed.report(run.prepared, record)
        if any(isinstance(r, WrittenRecord) and r.written.final for r in records):
            self._end(run, EndRecord())

    def _fail(self, run: FinetuneRun, error: Exception) -> None:
        logger.error("scheduling of job %s failed", run.job.name, exc_info=error)
        self._end(run, EndRecord(error=f"{type(error).__name__}: {error}"))

    def _end(self, run: FinetuneRun, record: EndRecord) -> None:
        """The job is over: blocks back, the worker closes it with the next plan."""
        run.release_all(self._lender)
        self._runs.remove(run)
        self._closing.append(StepPlan(job_id=run.job_id, close_job=True))
        self._feed.report(run.prepared, record)
        self._planner.set_objectives(*self._objectives())

    def _objectives(self) -> tuple[float, float]:
        """TPOT and TTFT in ms: the strictest of the jobs in training; a job's own goes before the
        server's."""
        options = self._co_serve.options
        tpot_ms = options.tpot_ms or DEFAULT_TPOT_MS
        ttft_ms = options.ttft_ms or DEFAULT_TTFT_MS
        slos = [run.job.slo or SLOConfig() for run in self._runs] or [SLOConfig()]
        return (
            min(slo.tpot_ms or tpot_ms for slo in slos),
            min(slo.ttft_ms or ttft_ms for slo in slos),
        )

    def _release_all(self) -> None:
        for run in self._runs:
            run.release_all(self._lender)

    def _give_way_to_inference(self) -> None:
        """When vLLM finds no blocks for a request, finetuning gives up its own first."""
        allocate = self.kv_cache_manager.allocate_slots

        def allocate_slots(request: Any, *args: Any, **kwargs: Any) -> Any:
            blocks = allocate(request, *args, **kwargs)
            if request.request_id in self.requests:
                while blocks is None and self._runs.release_blocks(self._lender):
                    blocks = allocate(request, *args, **kwargs)
            return blocks

        self.kv_cache_manager.allocate_slots = allocate_slots


class CoServeScheduler(CoServeMixin, Scheduler):
    pass


class CoServeAsyncScheduler(CoServeMixin, AsyncScheduler):
    pass
