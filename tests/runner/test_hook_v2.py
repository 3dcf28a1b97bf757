"""Holds the hook of model runner V2 to the installed vLLM: no V2 runner runs without a GPU."""

import inspect
from dataclasses import fields
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("vllm")

from vllm.config import CUDAGraphMode
from vllm.v1.worker.gpu import model_runner
from vllm.v1.worker.gpu.cudagraph_utils import CudaGraphManager, ModelCudaGraphManager
from vllm.v1.worker.gpu.dp_utils import dispatch_cg_and_sync_dp
from vllm.v1.worker.gpu.input_batch import InputBatch

from vllm_flexft.plan import PLAN_ATTRIBUTE
from vllm_flexft.runner.capture_op import Sites
from vllm_flexft.runner.hook import V2_RUNNER, CoServeRunnerMixin, add_finetuning
from vllm_flexft.runner.hook_v2 import CoServeV2RunnerMixin, _NoGraphs
from vllm_flexft.train.activations import LaneRows

V2 = model_runner.GPUModelRunner


def parameters(function):
    return list(inspect.signature(function).parameters)


def test_v2_runners_get_the_v2_hook_and_others_do_not():
    runner, other = object.__new__(V2), type("Runner", (), {})()
    add_finetuning(runner, None)
    add_finetuning(other, None)
    assert isinstance(runner, CoServeV2RunnerMixin)
    assert isinstance(other, CoServeRunnerMixin)
    assert not isinstance(other, CoServeV2RunnerMixin)
    assert V2.__module__ == V2_RUNNER


def test_what_the_hook_overrides_is_there_with_these_arguments():
    assert parameters(V2.execute_model)[:3] == ["self", "scheduler_output", "intermediate_tensors"]
    assert parameters(V2.sample_tokens) == ["self", "grammar_output"]
    assert parameters(V2.prepare_inputs)[:2] == ["self", "scheduler_output"]
    assert {"load_model", "get_model"} <= vars(V2).keys()
    assert not hasattr(V2, "_model_forward")  # else the V1 hook would be the simpler one


def test_what_the_hook_reads_is_there():
    assert {"req_ids", "query_start_loc_np"} <= {field.name for field in fields(InputBatch)}
    for attribute in ("kv_cache_config", "vllm_config", "cudagraph_manager"):
        assert f"self.{attribute}" in inspect.getsource(V2)
    source = inspect.getsource(V2.execute_model)
    # Inputs are prepared before the forward, graphs are asked of the attribute that is exchanged.
    assert source.index("dispatch_cg_and_sync_dp(") < source.index("self.prepare_inputs(")
    assert source.index("self.prepare_inputs(") < source.index("self.model(**model_inputs)")
    assert "dispatch_cg_and_sync_dp(\n            self.cudagraph_manager," in source


def test_without_graphs_the_runner_dispatches_to_none():
    assert parameters(_NoGraphs.dispatch) == parameters(CudaGraphManager.dispatch)
    manager = object.__new__(ModelCudaGraphManager)
    manager._resolve_effective_loras = lambda count: count + 1
    description, _ = dispatch_cg_and_sync_dp(
        _NoGraphs(manager), 3, 17, None, 1, 0, num_active_loras=2
    )
    assert description.cg_mode == CUDAGraphMode.NONE
    assert (description.num_reqs, description.num_tokens) == (3, 17)
    assert description.num_active_loras == 3


class Base:
    """What the hook meets of a V2 runner: the order of its calls."""

    cudagraph_manager = "graphs"

    def execute_model(self, scheduler_output, intermediate_tensors=None, dummy_run=False):
        self.seen = [type(self.cudagraph_manager)]
        if not dummy_run:
            self.prepare_inputs(scheduler_output, None, None, 0)
        self.seen.append({name: job.capture.rows for name, job in self._jobs.items()})
        self.seen.append(Sites._open is self._sites)

    def prepare_inputs(self, scheduler_output, *_):
        # V2's own order of rows: decodes before prefills, short before long.
        tokens = scheduler_output.num_scheduled_tokens
        req_ids = model_runner.sort_batch_req_ids(tokens, {}, 1)
        starts = np.cumsum([0, *(tokens[r] for r in req_ids)])
        return SimpleNamespace(req_ids=req_ids, query_start_loc_np=starts)


@pytest.fixture
def runner():
    runner = type("Runner", (CoServeV2RunnerMixin, Base), {})()
    runner.start_co_serving(None)
    runner._sites = Sites()
    store = SimpleNamespace(rows=lambda lane, ranges: LaneRows(lane, tuple(ranges)))
    trainer = SimpleNamespace(begin=lambda _: None, store=store, awaiting=False)
    runner._jobs["job"] = SimpleNamespace(capture=SimpleNamespace(rows=[]), trainer=trainer)
    return runner


def scheduled(plans, **tokens):
    output = SimpleNamespace(num_scheduled_tokens=tokens, scheduled_new_reqs=[])
    if plans:
        setattr(output, PLAN_ATTRIBUTE, plans)
    return output


def plan(*chunks):
    return SimpleNamespace(job_id="job", chunks=chunks, open_job=None, begin=())


def test_rows_of_chunks_are_found_in_the_order_of_v2(runner):
    chunks = (
        SimpleNamespace(req_id="ft-a", num_tokens=7, lane=0, row=0),
        SimpleNamespace(req_id="ft-b", num_tokens=3, lane=1, row=40),
    )
    batch = scheduled((plan(*chunks),), prefill=5, **{"ft-a": 7, "decode": 1, "ft-b": 3})
    assert runner.execute_model(batch) is None
    assert runner.seen[0] is _NoGraphs
    assert runner.seen[1]["job"] == [LaneRows(0, ((9, 16, 0),)), LaneRows(1, ((1, 4, 40),))]
    assert runner.seen[2], "the capture ops are heard during the forward"
    assert Sites._open is None
    assert runner._jobs["job"].capture.rows == []
    assert runner.cudagraph_manager == "graphs"


@pytest.mark.parametrize("plans", [(), (plan(),)], ids=["no plan", "slices only"])
def test_steps_without_chunks_keep_their_graphs(runner, plans):
    runner.execute_model(scheduled(plans, decode=1))
    assert runner.seen == [str, {"job": []}, False]


def test_vllms_dummy_runs_pass_through(runner):
    runner.execute_model(scheduled((), a=1), None, dummy_run=True)
    assert runner.seen == [str, {"job": []}, False]
