"""Work fits a room by the upper bound of its time."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from harness.plant import PRIOR, Plant
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_flexft.sched.latency import Feature, LatencyModel
from vllm_flexft.sched.planner import Budget, Objectives, StepLoad, allow
from vllm_flexft.sched.room import Room

FIXED = settings(derandomize=True, max_examples=150, deadline=None)
MODEL = LatencyModel(PRIOR)
_plant = Plant()
for _ in range(200):
    _features = _plant.step()
    MODEL.observe(_features, _plant.seconds(_features))

# 4 slices of the loss, 32 of layers: 64 tokens each
AMOUNTS = np.zeros((37, 3))
AMOUNTS[1:5, 0] = 40
AMOUNTS[5:, 1], AMOUNTS[5:, 2] = 64, 64 * 100
CUMULATIVE = np.cumsum(AMOUNTS, axis=0)
SLICES: Any = SimpleNamespace(num_slices=36, before=lambda slices: CUMULATIVE[slices].tolist())
SLICE_FEATURES = slice(Feature.LOSS, Feature.UPDATE)


def make(seconds: float, *, credit: float = 0.0, idle: bool = False, rows: int = 8) -> Room:
    budget = Budget(seconds, credit, seconds, 0.0, 0.0, idle)
    return Room(budget, MODEL.prices(), tokens=512, rows=rows)


def cost(index: int) -> float:
    return float(AMOUNTS[index + 1] @ MODEL.prices()[SLICE_FEATURES])


pieces = st.lists(
    st.one_of(
        st.tuples(st.just("chunk"), st.integers(0, 2000), st.integers(1, 700)),
        st.tuples(st.just("slices"), st.integers(0, 35), st.just(0)),
        st.tuples(st.just("update"), st.integers(1, 10**7), st.just(0)),
    ),
    max_size=8,
)
loads = st.builds(StepLoad, st.integers(1, 64), st.sampled_from([0, 300]), st.integers(0, 10**5))


@FIXED
@given(loads, st.floats(0.01, 1.0), st.floats(0, 1.5), pieces)
def test_no_plan_exceeds_what_the_model_allows(
    load: StepLoad, tpot_s: float, due_s: float, pieces: list
):
    """Whatever is asked for in whatever order, the bound of the whole step keeps the objective,
    and what requests have saved of it."""
    budget = allow(load, Objectives(tpot_s=tpot_s), MODEL, due_s=due_s)
    room = Room(budget, MODEL.costs.prices, tokens=2000, rows=8, estimate=budget.estimate)
    for kind, first, second in pieces:
        if kind == "chunk":
            if tokens := room.fit_chunk(first, second, min(16, second)):
                room.take_chunk(first, tokens)
        elif kind == "slices":
            room.fit_slices(SLICES, first)
        else:
            room.fit_parameters(Feature.UPDATE, first)
    _, bound = MODEL.predict(load.features() + room.features)
    assert bound <= max(budget.limit + budget.credit, budget.bound) + 1e-9
    assert not room.spent or bound <= due_s + 1e-9
    assert room.spent <= budget.seconds + budget.credit + 1e-9


def test_as_many_slices_fit_as_the_room_holds():
    room = make(cost(0) * 4 + cost(4) * 2.5)
    assert room.fit_slices(SLICES, 0) == 6
    assert room.features[SLICE_FEATURES].tolist() == [160, 128, 12800]
    assert room.fit_slices(SLICES, 6) == 0
    assert "slice" in room.lacking


def test_a_slice_longer_than_the_room_runs_on_credit_and_alone():
    assert make(0.6 * cost(4)).fit_slices(SLICES, 4) == 0
    room = make(0.6 * cost(4), credit=0.5 * cost(4))
    assert room.fit_slices(SLICES, 4) == 1
    assert room.fit_slices(SLICES, 5) == 0
    busy = make(0.9 * cost(4), credit=cost(4))
    busy.take_chunk(0, 16)
    assert busy.fit_slices(SLICES, 4) == 0


def test_a_slice_of_which_more_than_half_fits_is_taken_on_credit():
    mostly = cost(0) * 4 + cost(4) * 2.6
    assert make(mostly, credit=2.0 * cost(4)).fit_slices(SLICES, 0) == 7
    assert make(mostly, credit=1.5 * cost(4)).fit_slices(SLICES, 0) == 6, "most of it is kept"
    assert make(cost(0) * 4 + cost(4) * 2.4, credit=9.0 * cost(4)).fit_slices(SLICES, 0) == 6


def test_without_room_credit_buys_nothing():
    assert make(0.0, credit=1.0).fit_slices(SLICES, 4) == 0


def test_an_idle_step_runs_one_piece_of_any_length():
    room = make(1e-6, idle=True)
    assert room.fit_slices(SLICES, 0) == 1
    assert room.fit_slices(SLICES, 1) == 0
    assert make(1e-6, idle=True).fit_chunk(0, 500, 16) == 16
    assert make(1e-6, idle=True).fit_parameters(Feature.UPDATE, 10**9)


def test_charging_by_the_bound_leaves_room_for_more_than_prices_do():
    load = StepLoad(decode_rows=8, context=4000)
    budget = allow(load, Objectives(tpot_s=0.1), MODEL)
    by_price = Room(budget, MODEL.prices(), tokens=2000, rows=8)
    by_bound = Room(budget, MODEL.prices(), tokens=2000, rows=8, estimate=budget.estimate)
    assert by_bound.fit_chunk(100, 1000, 16) > by_price.fit_chunk(100, 1000, 16)


@FIXED
@given(st.floats(1e-4, 0.5), st.integers(0, 4000), st.integers(1, 512), st.integers(1, 64))
def test_a_chunk_is_the_longest_that_fits(seconds: float, context: int, remaining: int, least: int):
    def price(tokens: int) -> float:
        keys = tokens * (context + tokens / 2)
        prices = MODEL.prices()
        work = tokens * prices[Feature.CHUNK] + keys * prices[Feature.CHUNK_CONTEXT]
        return float(prices[Feature.CHUNKS] + work)

    tokens = make(seconds).fit_chunk(context, remaining, least)
    if tokens:
        assert min(least, remaining) <= tokens <= remaining
        assert price(tokens) <= seconds * (1 + 1e-9)
    if tokens < remaining:
        # one more would not fit, or the longest that fits is below the floor
        assert price(max(tokens + 1, min(least, remaining))) > seconds * (1 - 1e-9)


def test_a_chunk_below_the_floor_waits_but_the_end_of_a_sequence_does_not():
    prices = MODEL.prices()
    room = make(prices[Feature.CHUNKS] + 20 * prices[Feature.CHUNK])
    assert room.fit_chunk(0, 500, 64) == 0
    assert room.fit_chunk(0, 10, 64) == 10


def test_a_chunk_that_the_room_is_too_small_for_is_as_long_as_credit_pays_and_alone():
    prices = MODEL.prices()
    start, token = prices[Feature.CHUNKS], prices[Feature.CHUNK]
    room = make(0.5 * start, credit=start + 100 * token)
    tokens = room.fit_chunk(0, 500, 64)
    assert 64 <= tokens <= 100 + 0.5 * start / token
    room.take_chunk(0, tokens)
    assert room.exhausted
    busy = make(0.5 * start + 10 * token, credit=start + 100 * token)
    busy.fit_parameters(Feature.UPDATE, 1)
    assert busy.fit_chunk(0, 500, 64) == 0


def test_rows_and_tokens_run_out():
    assert make(1.0, rows=0).fit_chunk(0, 100, 16) == 0
    room = make(10.0, rows=2)
    room.take_chunk(0, 500)
    assert room.fit_chunk(0, 100, 16) == 0  # 12 tokens are left
    assert room.fit_chunk(0, 100, 12) == 12


def test_only_a_step_without_requests_pays_for_running_the_model():
    idle, busy = make(1.0, idle=True), make(1.0)
    idle.take_chunk(0, 100)
    busy.take_chunk(0, 100)
    assert idle.spent - busy.spent == pytest.approx(MODEL.prices()[Feature.STEP])
    assert idle.features[Feature.STEP] == 1
