"""The model-runner hook: finetune rows in, captured activations and training results out.

A mixin over vLLM's model runner. Steps without a plan go straight through.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from vllm.v1.outputs import (
    EMPTY_MODEL_RUNNER_OUTPUT,
    AsyncModelRunnerOutput,
    ModelRunnerOutput,
)

from flexft_patches import punica_cpu
from vllm_flexft.plan import PLAN_ATTRIBUTE, RESULT_ATTRIBUTE, OpenJob, StepPlan, StepResult
from vllm_flexft.runner.capture import place_ops
from vllm_flexft.runner.capture_op import Sites
from vllm_flexft.runner.containment import BlockIds, diverged, zero_blocks
from vllm_flexft.runner.opened_job import OpenedJob
from vllm_flexft.runner.touched import touched
from vllm_flexft.runner.view import served_model
from vllm_flexft.train.activations import ActivationStore, LaneRows
from vllm_flexft.train.model import ServedModel
from vllm_flexft.train.stream import BackwardStream, streams_for
from vllm_flexft.train.trainer import Trainer
from vllm_flexft.wiring import CoServeConfig

logger = logging.getLogger("vllm.flexft")

V2_RUNNER = "vllm.v1.worker.gpu.model_runner"

if TYPE_CHECKING:
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner as _RunnerBase
else:
    _RunnerBase = object


class CoServeRunnerMixin(_RunnerBase):
    """Adds finetuning to a vLLM model runner of the first kind (`CPUModelRunner` and, where V2 is
    switched off, `GPUModelRunner`)."""

    _plans: tuple[StepPlan, ...]  # of the step under way, one a job
    _not_opened: dict[str, StepResult]  # by job, of the step under way
    _jobs: dict[str, OpenedJob]
    _view: ServedModel | None
    _sites: Sites  # of the model, from when it is loaded
    _block_ids: dict[str, BlockIds]  # of this step's chunks
    _stream: BackwardStream | None  # None: no job was opened yet
    _no_rows: bool  # the step under way has no forward

    def start_co_serving(self, config: CoServeConfig) -> None:
        self._co_serve = config
        self._plans = ()
        self._not_opened, self._jobs, self._block_ids = {}, {}, {}
        self._view = self._stream = None
        self._no_rows = False

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """The model is compiled when it first runs: the capture ops are in it by then."""
        super().load_model(*args, **kwargs)
        self._sites = place_ops(self.get_model())

    @torch.inference_mode()
    def execute_model(
        self, scheduler_output: Any, intermediate_tensors: Any = None, **options: Any
    ) -> Any:
        self._plans = getattr(scheduler_output, PLAN_ATTRIBUTE, ())
        if self._stream is not None and self._stream.busy:
            self._stream.before_forward(touched(scheduler_output, self._plans))
        if not self._takes_part():
            return super().execute_model(scheduler_output, intermediate_tensors, **options)
        self._no_rows = not scheduler_output.num_scheduled_tokens
        chunks = {chunk.req_id for plan in self._plans for chunk in plan.chunks}
        self._block_ids = {
            request.req_id: request.block_ids
            for request in scheduler_output.scheduled_new_reqs
            if request.req_id in chunks
        }
        self._not_opened = {}
        for plan in self._plans:
            self._prepare(plan)
        try:
            output = super().execute_model(scheduler_output, intermediate_tensors, **options)
        finally:
            self._sites.close()
            for job in self._jobs.values():
                job.capture.rows = []
        if output is None:  # sampling comes next; the slices run after it
            return None
        return self._finish(output)

    @torch.inference_mode()
    def sample_tokens(self, grammar_output: Any) -> Any:
        output = super().sample_tokens(grammar_output)
        return self._finish(output) if self._takes_part() else output

    def _takes_part(self) -> bool:
        """Whether the step has finetune work, or results of earlier steps are awaited."""
        return bool(self._plans) or any(job.trainer.awaiting for job in self._jobs.values())

    def _model_forward(self, *args: Any, **kwargs: Any) -> Any:
        self._capture_chunks()
        if self.device.type != "cpu":
            return super()._model_forward(*args, **kwargs)
        with punica_cpu.in_use(self.lora_manager):
            return super()._model_forward(*args, **kwargs)

    def _determine_batch_execution_and_padding(self, *args: Any, **kwargs: Any) -> Any:
        """V1's choice of a CUDA graph: none in steps with chunks, since a replayed graph runs no
        capture op. They run the compiled model."""
        if any(plan.chunks for plan in self._plans):
            kwargs["force_eager"] = True
        return super()._determine_batch_execution_and_padding(*args, **kwargs)

    def _capture_chunks(self) -> None:
        """From here to the end of the forward, the rows of this step's chunks are kept."""
        for plan in self._plans:
            if plan.chunks and (job := self._jobs.get(plan.job_id)) is not None:
                try:
                    job.capture.rows = self._finetune_rows(plan, job.trainer.store)
                    self._sites.open()
                except Exception as error:
                    job.trainer.fail(error)

    def _finetune_rows(self, plan: StepPlan, store: ActivationStore) -> list[LaneRows]:
        """Where each chunk lies in the batch; rows are ordered by the runner, not by us."""
        index_of, starts = self._batch_layout()
        ranges: dict[int, list[tuple[int, int, int]]] = {}  # by lane
        for chunk in plan.chunks:
            at = index_of[chunk.req_id]
            start, stop = int(starts[at]), int(starts[at + 1])
            assert stop - start == chunk.num_tokens, (start, stop, chunk)
            ranges.setdefault(chunk.lane, []).append((start, stop, chunk.row))
        return [store.rows(lane, parts) for lane, parts in ranges.items()]

    def _batch_layout(self) -> tuple[Mapping[str, int], Any]:
        """Place of each request in the batch, and where each place's rows begin."""
        return self.input_batch.req_id_to_index, self.query_start_loc.np

    def _prepare(self, plan: StepPlan) -> None:
        """Before the forward: open the job, begin micro-batches. A failure becomes a result.

        Only a job that could not be opened is closed at once: later plans, some of them under way
        already, name its adapter in their batches.
        """
        if plan.open_job is not None:
            try:
                self._open(plan.open_job)
            except Exception as error:
                if not isinstance(error, ValueError):
                    logger.exception("finetune job %s cannot be opened", plan.open_job.job.name)
                message = str(error) or type(error).__name__
                self._not_opened[plan.job_id] = StepResult(plan.job_id, error=message)
        if (job := self._jobs.get(plan.job_id)) is not None:
            job.trainer.begin(plan.begin)

    def _finish(
        self, output: ModelRunnerOutput | AsyncModelRunnerOutput
    ) -> ModelRunnerOutput | AsyncModelRunnerOutput:
        """After the forward and sampling: train, and answer on the runner's output."""
        plans, self._plans = self._plans, ()
        results = [result for plan in plans for result in self._train(plan)]
        planned = {plan.job_id for plan in plans}
        for job_id, job in self._jobs.items():
            if job_id not in planned and job.trainer.awaiting:
                # In a step without a forward nobody is kept waiting.
                results += job.trainer.poll(wait=self._no_rows)
        if results:
            if isinstance(output, AsyncModelRunnerOutput):
                return _PendingOutput(output, tuple(results))
            if output is EMPTY_MODEL_RUNNER_OUTPUT:  # a shared constant
                output = copy.copy(output)
            setattr(output, RESULT_ATTRIBUTE, tuple(results))
        return output

    def _train(self, plan: StepPlan) -> list[StepResult]:
        not_opened = self._not_opened.get(plan.job_id)
        results = [not_opened] if not_opened is not None else []
        job = self._jobs.get(plan.job_id)
        if not results and job is not None:
            if job.capture.error is not None:
                job.trainer.fail(job.capture.error)
            self._contain_divergence(plan, job.trainer)
            results = job.trainer.step(plan)
        if plan.close_job and job is not None:
            del self._jobs[plan.job_id]
            job.close()
        return results

    def _contain_divergence(self, plan: StepPlan, trainer: Trainer) -> None:
        """See containment.py. Never raises."""
        try:
            chunks = diverged(plan.chunks, trainer.store, len(trainer.model.layers))
            if chunks:
                groups = self.kv_cache_config.kv_cache_groups
                layers = self.vllm_config.compilation_config.static_forward_context
                zero_blocks(chunks, self._block_ids, groups, layers)
                trainer.fail(FloatingPointError("activations are not finite"))
        except Exception as error:
            trainer.fail(error)

    def _open(self, setup: OpenJob) -> None:
        assert setup.job_id not in self._jobs, f"job {setup.job_id} is open"
        if self._view is None:
            groups = self.kv_cache_config.kv_cache_groups
            kv_group_of = {
                name: index for index, group in enumerate(groups) for name in group.layer_names
            }
            self._view = served_model(self.get_model(), self.vllm_config, kv_group_of)
        if self._stream is None:
            options = self._co_serve.options
            serial, num_sms = not options.overlap_backward, options.backward_sms
            streams = streams_for(self._view.device, serial=serial, num_sms=num_sms)
            self._stream = BackwardStream(streams)
        self._jobs[setup.job_id] = OpenedJob(
            setup, self._view, self._sites, self.lora_manager, self._stream
        )


class _PendingOutput(AsyncModelRunnerOutput):
    """With async scheduling, vLLM makes the output once the sampled tokens are on the host: what
    is hung on the pending one would be lost."""

    def __init__(self, pending: AsyncModelRunnerOutput, results: tuple[StepResult, ...]) -> None:
        self._pending, self._results = pending, results

    def get_output(self) -> ModelRunnerOutput:
        output = self._pending.get_output()
        setattr(output, RESULT_ATTRIBUTE, self._results)
        return output


def add_finetuning(runner: Any, config: CoServeConfig) -> None:
    """Turn a constructed vLLM model runner into a co-serving one, in place.

    The worker picks the runner's class itself (V1 or V2, CPU or GPU), so the mixin is put in front
    of whatever class it chose.
    """
    base = type(runner)
    mixin = CoServeRunnerMixin
    if any(cls.__module__ == V2_RUNNER for cls in base.__mro__):
        from vllm_flexft.runner.hook_v2 import CoServeV2RunnerMixin

        mixin = CoServeV2RunnerMixin
    runner.__class__ = type(f"CoServe{base.__name__}", (mixin, base), {})
    runner.start_co_serving(config)
