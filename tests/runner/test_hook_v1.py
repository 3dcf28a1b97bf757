"""The hook on the first model runner, as far as no engine on CPU can show it."""

import inspect

from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from vllm_flexft.plan import Chunk, StepPlan
from vllm_flexft.runner.hook import CoServeRunnerMixin


class Base:
    """What the hook meets of a V1 runner where a graph is chosen."""

    def _determine_batch_execution_and_padding(self, *args, **kwargs):
        return kwargs


class Runner(CoServeRunnerMixin, Base):
    pass


def test_steps_with_chunks_get_no_graph_and_others_choose_freely():
    runner = Runner()
    chunk = Chunk("flexft-1-1", 0, 0, 16)
    for plans, forced in (
        ((StepPlan("job", chunks=(chunk,)),), True),
        ((StepPlan("job"),), None),
        ((), None),
    ):
        runner._plans = plans
        chosen = runner._determine_batch_execution_and_padding(num_tokens=3)
        assert chosen.get("force_eager") is forced


def test_vllm_chooses_graphs_where_the_hook_steps_in():
    method = GPUModelRunner._determine_batch_execution_and_padding
    assert "force_eager" in inspect.signature(method).parameters
    assert "valid_modes={CUDAGraphMode.NONE} if force_eager" in inspect.getsource(method)
    source = inspect.getsource(GPUModelRunner.execute_model)
    call = source.index("self._determine_batch_execution_and_padding(")
    assert "force_eager" not in source[call : call + 800]
