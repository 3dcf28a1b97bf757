"""The hook on vLLM's second model runner, the default on CUDA (vllm/v1/worker/gpu/model_runner.py).

It has no method around the forward; `prepare_inputs` tells the order of rows, and which graph is
replayed is asked of `cudagraph_manager`. The model is compiled when it first runs, so the capture
ops are placed as soon as it is loaded. Held to vLLM's signatures by tests; no GPU has run it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from vllm.config import CUDAGraphMode
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor

from vllm_flexft.plan import PLAN_ATTRIBUTE
from vllm_flexft.runner.hook import CoServeRunnerMixin


class CoServeV2RunnerMixin(CoServeRunnerMixin):
    cudagraph_manager: Any
    _input_batch: Any  # vLLM's InputBatch of the step under way

    @torch.inference_mode()
    def execute_model(
        self, scheduler_output: Any, intermediate_tensors: Any = None, **options: Any
    ) -> Any:
        plans = getattr(scheduler_output, PLAN_ATTRIBUTE, ())
        manager = self.cudagraph_manager
        if any(plan.chunks for plan in plans):
            self.cudagraph_manager = _NoGraphs(manager)
        try:
            return super().execute_model(scheduler_output, intermediate_tensors, **options)
        finally:
            self.cudagraph_manager = manager

    def prepare_inputs(self, *args: Any, **kwargs: Any) -> Any:
        self._input_batch = super().prepare_inputs(*args, **kwargs)
        self._capture_chunks()
        return self._input_batch

    def _batch_layout(self) -> tuple[Mapping[str, int], Any]:
        batch = self._input_batch
        return {req_id: i for i, req_id in enumerate(batch.req_ids)}, batch.query_start_loc_np


class _NoGraphs:
    """A graph manager that never finds one: a replayed graph runs no capture op."""

    def __init__(self, manager: Any) -> None:
        self._manager = manager

    def __getattr__(self, name: str) -> Any:
        return getattr(self._manager, name)

    def dispatch(
        self,
        num_reqs: int,
        num_tokens: int,
        uniform_token_count: int | None,
        num_active_loras: int,
        max_query_len: int | None = None,
        num_ubatches: int = 1,
    ) -> BatchExecutionDescriptor:
        """As `CudaGraphManager.dispatch` where it has no candidate."""
        return BatchExecutionDescriptor(
            cg_mode=CUDAGraphMode.NONE,
            num_tokens=num_tokens,
            num_reqs=num_reqs,
            num_active_loras=self._manager._resolve_effective_loras(num_active_loras),
            num_ubatches=num_ubatches,
        )
