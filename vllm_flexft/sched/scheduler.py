"""vLLM's scheduler with finetuning in what it leaves over.

Each step vLLM schedules inference as if alone; then finetune work is appended to its output. See
design notes in docs/architecture.md.
"""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.outputs import ModelRunnerOutput

from flexft_patches import engine_loop
from vllm_flexft.graph.ops import ModelShape
from vllm_flexft.plan import PLAN_ATTRIBUTE, RESULT_ATTRIBUTE, StepPlan, StepResult
from vllm_flexft.sched.admission import EngineLimits
from vllm_flexft.sched.costs import UnitCosts
from vllm_flexft.sched.draft import Draft, Drafts
from vllm_flexft.sched.feed import JobFeed
from vllm_flexft.sched.latency import LatencyModel
from vllm_flexft.sched.latency_file import latency_file
from vllm_flexft.sched.orphan import end_with_parent
from vllm_flexft.sched.pacer import Pacer
from vllm_flexft.sched.planner import Objectives, StepLoad
from vllm_flexft.sched.prepared import PreparedJob
from vllm_flexft.sched.progress import EndRecord, WrittenRecord
from vllm_flexft.sched.reclaim import BlockReclaim
from vllm_flexft.sched.room import Room
from vllm_flexft.sched.run import FinetuneRun
from vllm_flexft.sched.run_set import RunSet
from vllm_flexft.sched.sequence_kv import KVLender
from vllm_flexft.sched.step_output import append_chunks, is_measurable, load_of
from vllm_flexft.sched.trace import StepTrace
from vllm_flexft.wiring import TRAINING_LORA_ID_BASE, CoServeConfig, base_model, memory_budget

logger = logging.getLogger("vllm.flexft")

RESERVED_BLOCKS_SHARE = 0.05  # of the KV cache, never lent to finetuning

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
        self._shape = ModelShape.from_hf_config(self.vllm_config.model_config.hf_text_config)
        num_blocks = self.cache_config.num_gpu_blocks
        reserved_blocks = int(num_blocks * RESERVED_BLOCKS_SHARE)
        self._lender = KVLender(self.kv_cache_manager, reserved_blocks)
        self._num_blocks = num_blocks - 1  # one is vLLM's null block
        # Each KV-cache group takes its own blocks of a sequence.
        self._num_groups = len(self.kv_cache_config.kv_cache_groups)
        self._lendable_blocks = (self._num_blocks - reserved_blocks) // self._num_groups
        self._runs = RunSet()
        self._reclaim = BlockReclaim(self.kv_cache_manager, self._lender, self._runs)
        self._closing: list[StepPlan] = []
        self._load = StepLoad()  # of the last step
        self._jobs_opened = 0
        self._chunks_in_flight: list[str] = []
        self._pacing_failed = False  # and it was said
        self._in_prefill: set[str] = set()  # requests without a first token
        device = self.vllm_config.device_config.device_type
        model = LatencyModel(UnitCosts.of(self._shape).prior(device))
        self._latency_file = latency_file(self.vllm_config)
        self._latency_file.load(model)
        trace = StepTrace() if config.options.step_trace is not None else None
        self._pacer = Pacer(model, self._objectives(), trace)
        self._drafts = Drafts(
            self._runs,
            self._lender,
            self._pacer,
            self._fail,
            max_tokens=self.max_num_scheduled_tokens,
            max_rows=self.scheduler_config.max_num_seqs,
            block_size=self.block_size,
            v2_runner=self.use_v2_model_runner,
        )
        self._engine_running: Callable[[], bool] = lambda: True
        limits = EngineLimits(
            max_model_len=self.max_model_len,
            kv_tokens=self._lendable_blocks * self.block_size,
            max_lora_rank=self.lora_config.max_lora_rank,
            rank_was_given=config.rank_was_given,
            shape=self._shape,
            itemsize=self.vllm_config.model_config.dtype.itemsize,
            activation_policy=config.options.activation_policy,
            memory_bytes=lambda: memory_budget(self._co_serve.options, device),
            jobs_at_once=config.options.max_jobs_at_once,
            device=device,
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
        entered = time.monotonic()
        self.finished_req_ids.update(self._chunks_in_flight)
        self._chunks_in_flight = []
        self._give_way_to_inference()
        if self._feed.retirement.pending:
            self._look_over_adapters()
        output: SchedulerOutput = super().schedule(*args, **kwargs)
        self._pacer.tokens.ended(output.finished_req_ids)
        self._in_prefill.update(request.req_id for request in output.scheduled_new_reqs)
        load = self._load = self._load_of(output)
        room = None
        if self._may_finetune():
            room = self._append_finetuning(output, load, entered)
        blocks = (self._lender.num_blocks, self._num_free_blocks())
        learn = is_measurable(output)
        self._guarded(
            self._pacer.planned, id(output), entered, load, room, measurable=learn, blocks=blocks
        )
        return output

    def get_grammar_bitmask(self, *args: Any, **kwargs: Any) -> Any:
        """The engine asks for it when the worker has the step: what the next plans need, and can be
        had before, is done while it computes."""
        bitmask = super().get_grammar_bitmask(*args, **kwargs)
        self._guarded(self._pacer.learn)
        if self._may_finetune() and not self._runs.short_of_blocks:
            for run in self._runs:
                try:
                    run.prepare(self._lender)
                except Exception as error:
                    self._fail(run, error)
            self._guarded(self._drafts.draw_ahead, time.monotonic(), self._load)
        return bitmask

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> Any:
        now = time.monotonic()
        self._guarded(self._pacer.finished, id(scheduler_output), now)
        for result in getattr(model_runner_output, RESULT_ATTRIBUTE, ()):
            if (run := self._runs.get(result.job_id)) is not None:
                try:
                    self._take_result(run, result)
                except Exception as error:
                    self._fail(run, error)
        answers = super().update_from_output(scheduler_output, model_runner_output)
        if self._in_prefill:
            self._note_first_tokens(now)
        return answers

    def has_requests(self) -> bool:
        if super().has_requests():
            return True
        pending = bool(self._runs or self._closing or self._feed.has_ready())
        if not (finetuning := self._may_finetune() and pending):
            self._pacer.idle()
            if self._feed.retirement.pending and not self._pacer.num_in_flight:
                self._look_over_adapters()
        return finetuning

    def reset_prefix_cache(self, *args: Any, **kwargs: Any) -> bool:
        self._release_all()
        return super().reset_prefix_cache(*args, **kwargs)

    def set_pause_state(self, pause_state: PauseState) -> None:
        super().set_pause_state(pause_state)
        if pause_state != PauseState.UNPAUSED:
            self._release_all()

    def shutdown(self) -> None:
        self._feed.stop()
        self._latency_file.save(self._pacer.model_state())
        if (path := self._co_serve.options.step_trace) is not None:
            try:
                self.dump_step_trace(path)
            except OSError as error:
                logger.warning("the step trace could not be written to %s: %s", path, error)
        super().shutdown()

    def dump_step_trace(self, path: Path) -> None:
        """Write what is known of the last steps, as JSON lines, or CSV by the name's ending.

        Raises:
            ValueError: the server runs without the option `step_trace`.
            OSError: the file cannot be written.
        """
        if self._pacer.trace is None:
            raise ValueError("no steps were traced: start the server with the option step_trace")
        self._pacer.trace.dump(path)

    # ---- finetuning

    def _look_over_adapters(self) -> None:
        """Tell which adapters' folders unfinished requests name."""
        now, requests = time.monotonic(), self.requests.values()
        paths = {r.lora_request.lora_path for r in requests if r.lora_request is not None}
        named = frozenset(str(Path(path)) for path in paths)  # as the store spells them
        self._feed.retirement.seen(named, now, step_runs=self._pacer.num_in_flight > 0)

    def _may_finetune(self) -> bool:
        return self._pause_state == PauseState.UNPAUSED and self._engine_running()

    def _load_of(self, output: SchedulerOutput) -> StepLoad:
        used = self._num_blocks - self._num_free_blocks() - self._lender.num_blocks
        waiting = len(self.waiting) + len(self.kv_holding_waiting)
        return load_of(
            output,
            # Full blocks are a little more than the keys in them, shared ones a little less.
            context=max(0, used) * self.block_size // self._num_groups,
            # Not those that wait for a grammar, for a remote cache or for more of their prompt.
            num_waiting=waiting - len(self.deferred_waiting),
            num_requests=waiting + len(self.running),
        )

    def _num_free_blocks(self) -> int:
        return self.kv_cache_manager.block_pool.get_num_free_blocks()

    def _note_first_tokens(self, now: float) -> None:
        for name in tuple(self._in_prefill):
            request = self.requests.get(name)
            if request is None:
                self._in_prefill.discard(name)
            elif request.num_output_tokens:
                self._in_prefill.discard(name)
                self._pacer.tokens.first_token(name, now, self._pacer.num_in_flight)

    def _append_finetuning(
        self, output: SchedulerOutput, load: StepLoad, now: float
    ) -> Room | None:
        """Add finetune work to a scheduled step; returns what it took, None without a job. Never
        raises: an error in planning fails the job, not the engine."""
        while self._feed.has_ready() and (prepared := self._feed.take()) is not None:
            self._drafts.take_back()
            self._start(prepared)
        for run in self._runs:
            if self._feed.is_cancelled(run.job_id):
                self._end(run, EndRecord(cancelled=True))
        if not (self._runs or self._closing):
            return None
        plans, self._closing = self._closing, []
        closing = {plan.job_id for plan in plans}
        rows = len(output.num_scheduled_tokens)
        draft: Draft | None = self._guarded(self._drafts.of_step, now, load, rows, closing)
        if draft is not None:
            plans += self._commit(draft, output)
        if plans:
            setattr(output, PLAN_ATTRIBUTE, tuple(plans))
        return None if draft is None else draft.room

    def _commit(self, draft: Draft, output: SchedulerOutput) -> list[StepPlan]:
        """All that can fail for a job comes before the first change to `output` for it."""
        plans, room = [], draft.room
        for run, reason in draft.lacking:
            run.starvation.postponed(time.monotonic(), run.job.name, reason)
        for run, work, requests in draft.parts:
            spent = room.spent
            try:
                plan = run.commit(work, room)
                fresh = self._get_new_block_ids_to_zero()
            except Exception as error:
                self._fail(run, error)
                continue
            plans.append(plan)
            if room.spent > spent:
                draft.seconds[run.job_id] = draft.seconds.get(run.job_id, 0.0) + room.spent - spent
            append_chunks(output, work, requests, fresh)
            self._chunks_in_flight.extend(chunk.req_id for chunk in work.chunks)
        self._runs.charge(draft.seconds)
        return plans

    def _start(self, prepared: PreparedJob) -> None:
        self._jobs_opened += 1
        limits = self._engine_limits.of_run(
            prepared,
            max_rows=self._co_serve.options.max_rows_in_flight,
            block_size=self.block_size,
        )
        # a new number for each opening: vLLM must never take one adapter for another
        lora_id = TRAINING_LORA_ID_BASE + self._jobs_opened
        try:
            model = base_model(self.vllm_config)
            self._runs.add(FinetuneRun(prepared, limits, self._shape.num_layers, model, lora_id))
            self._pacer.objectives = self._objectives()
        except Exception as error:
            logger.exception("finetune job %s cannot start", prepared.job.name)
            self._feed.report(prepared, EndRecord(error=f"{type(error).__name__}: {error}"))

    def _take_result(self, run: FinetuneRun, result: StepResult) -> None:
        if result.error is not None:
            for written in result.written:  # before the failure
                self._feed.report(run.prepared, WrittenRecord(written))
            self._end(run, EndRecord(error=result.error))
            return
        records = run.on_result(result)
        for record in records:
            self._feed.report(run.prepared, record)
        if any(isinstance(r, WrittenRecord) and r.written.final for r in records):
            self._end(run, EndRecord())

    def _guarded(self, act: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """None, and the jobs fail, where pacing does: the engine goes on."""
        try:
            return act(*args, **kwargs)
        except Exception as error:
            if not self._runs and not self._pacing_failed:
                logger.exception("pacing failed; no job is in training")
            self._pacing_failed = True
            for run in self._runs:
                self._fail(run, error)
            return None

    def _fail(self, run: FinetuneRun, error: Exception) -> None:
        logger.error("scheduling of job %s failed", run.job.name, exc_info=error)
        self._end(run, EndRecord(error=f"{type(error).__name__}: {error}"))

    def _end(self, run: FinetuneRun, record: EndRecord) -> None:
        """The job is over: blocks back, the worker closes it with the next plan."""
        if self._runs.get(run.job_id) is not run:
            return  # it failed while it was ended
        self._drafts.take_back()
        run.drawn_ahead = None  # even if taking it back is what failed
        run.release_all(self._lender)
        self._runs.remove(run)
        self._closing.append(StepPlan(job_id=run.job_id, close_job=True))
        self._feed.report(run.prepared, record)
        self._pacer.objectives = self._objectives()
        self._feed.save(self._latency_file, self._pacer.model_state())

    def _objectives(self) -> Objectives:
        return Objectives.strictest(self._co_serve.options, [run.job.slo for run in self._runs])

    def _release_all(self) -> None:
        self._drafts.take_back()
        for run in self._runs:
            run.release_all(self._lender)

    def _give_way_to_inference(self) -> None:
        """In a step in which vLLM may find no blocks for a request, finetuning gives up its own
        first."""
        num_running, num_waiting = self.get_request_counts()
        # What running requests may need: a block each, and those that this step's tokens fill.
        most = num_running + self.max_num_scheduled_tokens // self.block_size
        short = num_waiting or self._num_free_blocks() < most * self._num_groups
        if reclaim := bool(short and self._lender.num_blocks):
            self._drafts.take_back()
        self._reclaim.switch(reclaim)


class CoServeScheduler(CoServeMixin, Scheduler):
    pass


class CoServeAsyncScheduler(CoServeMixin, AsyncScheduler):
    pass
