"""What is kept is exactly what the backward reads."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import pytest
from harness.backward import backward, trainer_of, with_random_keys
from hypothesis import HealthCheck, given, settings

from vllm_flexft.graph.families import TARGETS
from vllm_flexft.graph.job_memory import JobMemory, Lanes
from vllm_flexft.graph.ops import CACHED
from vllm_flexft.train.window import WindowTensors

TOKENS, WINDOW = 20, 7
DRAWS = settings(
    derandomize=True, deadline=None, database=None, max_examples=40,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip
some_targets = st.sets(st.sampled_from(sorted(TARGETS)), min_size=1).map(sorted)
some_layers = st.sampled_from([None, [0], [1], [2], [0, 2], [1, 2]])
# From the least budget to the one for everything.
some_budget = st.floats(0.0, 1.0)


def trainer(model: Any, targets: list[str], layers: list[int] | None, budget: float) -> Any:
    peft = {"target_modules": targets, "layers_to_transform": layers}
    setup = trainer_of(model, TOKENS, WINDOW, peft=peft).setup
    memory = JobMemory.of(model.shape, setup.job, 4, "auto", setup.windows)
    lanes = Lanes(1, TOKENS)
    other = memory.state_bytes + memory.working_bytes(lanes)
    least, most = (
        memory.plan(lanes, float("inf"), policy).bytes_per_token * TOKENS + other
        for policy in ("minimal", "fast")
    )
    within = least + budget * (most - least)
    return trainer_of(model, TOKENS, WINDOW, peft=peft, memory_bytes=within + 1)


@pytest.fixture(params=["llama", "qwen3"])
def model(request: pytest.FixtureRequest, bench: Any) -> Any:
    return with_random_keys(bench(request.param).served_model())


@DRAWS
@given(some_targets, some_layers, some_budget)
def test_losing_any_kept_tensor_breaks_a_gradient(model, targets, layers, budget):
    made = trainer(model, targets, layers, budget)
    backward(made, TOKENS)
    assert made.adapter.grad.isfinite().all()
    assert made.adapter.grad.any()
    for kept in made.store._lanes[0].values():
        before = kept.clone()
        kept.fill_(float("nan"))
        made.adapter.grad.zero_()
        backward(made, TOKENS)
        assert not made.adapter.grad.isfinite().all()
        kept.copy_(before)


@DRAWS
@given(some_targets, some_layers, some_budget)
def test_each_layer_reads_what_the_graph_says_and_nothing_else(model, targets, layers, budget):
    made = trainer(model, targets, layers, budget)
    read: dict[int, set[str]] = {}
    depth = 0
    get = WindowTensors.__getitem__

    def seen(self: WindowTensors, name: str) -> Any:
        nonlocal depth
        if depth == 0:  # not on the way to another tensor
            read.setdefault(self._layer.index, set()).add(name)
        depth += 1
        try:
            return get(self, name)
        finally:
            depth -= 1

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WindowTensors, "__getitem__", seen)
        backward(made, TOKENS)
    for layer, needs in made.memory.needs.items():
        assert read.get(layer, set()) == needs.tensors - CACHED
