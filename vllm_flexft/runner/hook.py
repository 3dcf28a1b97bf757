"""The model-runner hook: finetune rows in, captured activations and training results out.

A mixin over vLLM's model runner. Steps without a plan go straight through.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import psutil
import torch
from vllm.v1.outputs import (
    EMPTY_MODEL_RUNNER_OUTPUT,
    AsyncModelRunnerOutput,
    ModelRunnerOutput,
)

from vllm_flexft.plan import PLAN_ATTRIBUTE, RESULT_ATTRIBUTE, OpenJob, StepPlan, StepResult
from vllm_flexft.runner.capture import Capture, CapturedRows
from vllm_flexft.runner.containment import BlockIds, diverged, zero_blocks
from vllm_flexft.runner.slots import close_slot, open_slot
from vllm_flexft.runner.view import served_model
from vllm_flexft.train.model import ServedModel
from vllm_flexft.train.trainer import Trainer
from vllm_flexft.wiring import CoServeConfig

logger = logging.getLogger("vllm.flexft")

FREE_MEMORY_SHARE = 0.25


if TYPE_CHECKING:
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner as _RunnerBase
else:
    _RunnerBase = object


class CoServeRunnerMixin(_RunnerBase):
    """Adds finetuning to a vLLM model runner (V1: `GPUModelRunner`, `CPUModelRunner`)."""

    _plan: StepPlan | None
    _result: StepResult | None
    _trainer: Trainer | None
    _capture: Capture | None
    _view: ServedModel | None
    _lora_int_id: int | None  # of the slot in training
    _block_ids: dict[str, BlockIds]  # of this step's chunks

    def start_co_serving(self, config: CoServeConfig) -> None:
        self._co_serve = config
        self._plan = self._result = self._trainer = self._capture = self._view = None
        self._lora_int_id = None
        self._block_ids = {}

    @torch.inference_mode()
    def execute_model(self, scheduler_output: Any, intermediate_tensors: Any = None) -> Any:
        plan: StepPlan | None = getattr(scheduler_output, PLAN_ATTRIBUTE, None)
        if plan is None:
            return super().execute_model(scheduler_output, intermediate_tensors)
        self._plan = plan
        chunks = {chunk.req_id for chunk in plan.chunks}
        self._block_ids = {
            request.req_id: request.block_ids
            for request in scheduler_output.scheduled_new_reqs
            if request.req_id in chunks
        }
        self._result = self._prepare(plan)
        output = super().execute_model(scheduler_output, intermediate_tensors)
        if output is None:  # sampling comes next; the slices run after it
            return None
        return self._finish(output)

    @torch.inference_mode()
    def sample_tokens(self, grammar_output: Any) -> Any:
        output = super().sample_tokens(grammar_output)
        return output if self._plan is None else self._finish(output)

    def _model_forward(self, *args: Any, **kwargs: Any) -> Any:
        capture, trainer = self._capture, self._trainer
        if self._plan is None or capture is None or trainer is None or not self._plan.chunks:
            return super()._model_forward(*args, **kwargs)
        try:
            capture.rows = self._finetune_rows(self._plan)
        except Exception as error:
            trainer.fail(error)
        try:
            return super()._model_forward(*args, **kwargs)
        finally:
            capture.rows = []

    def _finetune_rows(self, plan: StepPlan) -> list[CapturedRows]:
        """Where each chunk lies in the batch; rows are ordered by the runner, not by us."""
        index_of = self.input_batch.req_id_to_index
        starts = self.query_start_loc.np
        rows = []
        for chunk in plan.chunks:
            at = index_of[chunk.req_id]
            start, stop = int(starts[at]), int(starts[at + 1])
            assert stop - start == chunk.num_tokens, (start, stop, chunk)
            rows.append(CapturedRows(start, stop, chunk.lane, chunk.row))
        return rows

    def _prepare(self, plan: StepPlan) -> StepResult | None:
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
                self._close()
                return StepResult(plan.job_id, error=str(error) or type(error).__name__)
        if self._trainer is not None:
            self._trainer.begin(plan.begin)
        return None

    def _finish(
        self, output: ModelRunnerOutput | AsyncModelRunnerOutput
    ) -> ModelRunnerOutput | AsyncModelRunnerOutput:
        """After the forward and sampling: train, and answer on the runner's output."""
        plan, result = self._plan, self._result
        assert plan is not None
        self._plan = self._result = None
        if result is None and self._trainer is not None:
            if self._capture is not None and self._capture.error is not None:
                self._trainer.fail(self._capture.error)
            self._contain_divergence(plan, self._trainer)
            result = self._trainer.step(plan)
        if plan.close_job:
            self._close()
        if result is not None:
            if isinstance(output, AsyncModelRunnerOutput):
                return _PendingOutput(output, result)
            if output is EMPTY_MODEL_RUNNER_OUTPUT:  # a shared constant
                output = copy.copy(output)
            setattr(output, RESULT_ATTRIBUTE, result)
        return output

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
        assert self._trainer is None, "one job at a time"
        if self._view is None:
            groups = self.kv_cache_config.kv_cache_groups
            kv_group_of = {
                name: index for index, group in enumerate(groups) for name in group.layer_names
            }
            self._view = served_model(self.get_model(), self.vllm_config, kv_group_of)
        view, manager = self._view, self.lora_manager
        self._lora_int_id = setup.lora_int_id
        lora_dtype = manager.lora_config.lora_dtype
        self._trainer = Trainer(
            setup,
            view,
            lambda targets: open_slot(
                manager, setup.lora_int_id, setup.job.peft.r, targets, lora_dtype
            ),
            memory_bytes=self._memory_bytes(view.device),
        )
        self._capture = Capture(view, self._trainer.store)

    def _memory_bytes(self, device: torch.device) -> float:
        """For activations: the server option, else a quarter of what the device has free."""
        if self._co_serve.options.memory_gib is not None:
            return self._co_serve.options.memory_gib * 2**30
        if device.type == "cuda":
            free = torch.cuda.mem_get_info(device)[0]
        else:
            free = psutil.virtual_memory().available
        return FREE_MEMORY_SHARE * free

    def _close(self) -> None:
        """Let go of all that the job held, in whatever state it is. Never raises."""
        releases: list[Callable[[], None]] = []
        if self._capture is not None:
            releases.append(self._capture.remove)
        if self._trainer is not None:
            releases.append(self._trainer.close)
        if (lora_int_id := self._lora_int_id) is not None:
            releases.append(lambda: close_slot(self.lora_manager, lora_int_id))
        self._capture = self._trainer = self._lora_int_id = None
        for release in releases:
            try:
                release()
            except Exception:
                logger.exception("closing a finetune job")


class _PendingOutput(AsyncModelRunnerOutput):
    """With async scheduling, vLLM makes the output once the sampled tokens are on the host: what
    is hung on the pending one would be lost."""

    def __init__(self, pending: AsyncModelRunnerOutput, result: StepResult) -> None:
        self._pending, self._result = pending, result

    def get_output(self) -> ModelRunnerOutput:
        output = self._pending.get_output()
        setattr(output, RESULT_ATTRIBUTE, self._result)
        return output


def add_finetuning(runner: Any, config: CoServeConfig) -> None:
    """Turn a constructed vLLM model runner into a co-serving one, in place.

    The worker picks the runner's class itself (V1 or V2, CPU or GPU), so the mixin is put in front
    of whatever class it chose.
    """
    base = type(runner)
    runner.__class__ = type(f"CoServe{base.__name__}", (CoServeRunnerMixin, base), {})
    runner.start_co_serving(config)
