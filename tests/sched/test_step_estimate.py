"""Against the latency model's formulas in plain numpy."""

from __future__ import annotations

import functools

import numpy as np
import pytest
from harness.plant import PRIOR, Plant
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_flexft.sched.latency import NUM_FEATURES, LatencyModel, Vector
from vllm_flexft.sched.step_estimate import JITTER_S

FIXED = settings(derandomize=True, max_examples=60, deadline=None)
pieces = st.lists(
    st.lists(st.tuples(st.integers(0, NUM_FEATURES - 1), st.floats(0, 1000)), max_size=4),
    max_size=5,
)


@functools.cache
def learnt(steps: int) -> LatencyModel:
    model, plant = LatencyModel(PRIOR), Plant(3)
    for _ in range(steps):
        features = plant.step()
        model.observe(features, plant.seconds(features))
    return model


def reference(model: LatencyModel, features: Vector) -> tuple[float, float]:
    state = model.state()
    x = features * np.array(state["prior"])
    mean = float(np.array(state["theta"]) @ x)
    own = float(x @ np.array(state["p"]) @ x)
    deviation = np.sqrt(own + (state["noise"] * mean) ** 2 + JITTER_S**2)
    return mean, mean + state["bound"] * float(deviation)


@pytest.mark.parametrize("steps", [0, 5, 200])
@FIXED
@given(pieces=pieces)
def test_an_estimate_is_that_of_all_that_was_added(steps: int, pieces: list) -> None:
    model = learnt(steps)
    load = Plant(1).step(finetune=False)
    estimate, total = model.estimate(load), load.copy()
    for piece in pieces:
        for feature, amount in piece:
            total[feature] += amount
        mean, upper = reference(model, total)
        assert estimate.upper_with(piece) == pytest.approx(upper, rel=1e-9)
        estimate.add(piece)
        assert (estimate.mean, estimate.upper) == pytest.approx((mean, upper), rel=1e-9)
    assert model.predict(total) == pytest.approx(reference(model, total), rel=1e-9)
