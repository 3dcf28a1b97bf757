"""Room for finetuning: never more than the objectives leave, by the model's upper bound."""

from __future__ import annotations

import numpy as np
import pytest
from harness.plant import PRIOR, Plant
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_flexft.sched.latency import Feature, LatencyModel
from vllm_flexft.sched.planner import (
    CREDIT_SHARE,
    TPOT_MARGIN,
    TTFT_SHARE,
    Objectives,
    StepLoad,
    allow,
    carry,
)

FIXED = settings(derandomize=True, max_examples=150, deadline=None)
IDLE = StepLoad()
DECODE = StepLoad(decode_rows=8, context=4000)
loads = st.builds(
    StepLoad, st.integers(0, 256), st.sampled_from([0, 0, 64, 2000]), st.integers(0, 10**6),
    st.sampled_from([0, 0, 0, 1, 50]),
)  # fmt: skip
objectives = st.builds(Objectives, st.floats(0.005, 0.5), st.floats(0.1, 10), st.just(0.0))


def learnt(steps: int = 300, seed: int = 0) -> LatencyModel:
    model, plant = LatencyModel(PRIOR), Plant(seed)
    for _ in range(steps):
        features = plant.step()
        model.observe(features, plant.seconds(features))
    return model


MODEL = learnt()


@FIXED
@given(loads, objectives, st.floats(0, 1), st.integers(0, 20))
def test_inference_and_budget_together_keep_the_objective(
    load: StepLoad, objectives: Objectives, credit: float, steps: int
):
    budget = allow(load, objectives, learnt(steps), credit)
    assert 0 <= budget.seconds < float("inf")
    if load.num_tokens and budget.seconds:
        assert budget.bound + budget.seconds <= TPOT_MARGIN * objectives.tpot_s + 1e-12


@FIXED
@given(loads, objectives, st.floats(0, 1))
def test_nothing_is_allowed_while_requests_wait_that_could_run(
    load: StepLoad, objectives: Objectives, credit: float
):
    waiting = StepLoad(load.decode_rows, load.prefill_tokens, load.context, num_waiting=1)
    budget = allow(waiting, objectives, MODEL, credit)
    assert budget.seconds == 0
    assert budget.credit == 0
    assert "wait" in budget.reason


def test_a_step_without_requests_lasts_at_most_a_part_of_the_first_token_objective():
    budget = allow(IDLE, Objectives.of(None, 2000), MODEL)
    assert budget.seconds == TTFT_SHARE * 2.0
    assert budget.idle


def test_inference_that_needs_all_of_the_objective_leaves_nothing_and_says_so():
    budget = allow(DECODE, Objectives.of(5, None), MODEL, credit=1.0)
    assert budget.seconds == budget.credit == 0
    assert "TPOT" in budget.reason


@FIXED
@given(st.lists(st.tuples(loads, st.floats(0, 1)), min_size=1, max_size=50), objectives)
def test_over_any_run_of_steps_the_objective_holds_on_average(steps: list, objectives: Objectives):
    """However much of budget and credit each step spends."""
    credit, over, limit = 0.0, 0.0, TPOT_MARGIN * objectives.tpot_s
    for load, part in steps:
        budget = allow(load, objectives, MODEL, credit)
        spent = part * (budget.seconds + budget.credit)
        credit = carry(budget, objectives, credit, spent)
        if not budget.idle and load.num_tokens and budget.seconds:
            over = max(0.0, over + budget.bound + spent - limit)
            assert over <= CREDIT_SHARE * objectives.tpot_s + 1e-9
        else:
            over = 0.0  # what inference does alone is not ours


def test_credit_is_what_steps_left_and_is_used_up_by_what_they_take():
    goal = Objectives.of(50, None)
    budget = allow(DECODE, goal, MODEL)
    saved = carry(budget, goal, 0.0, spent=0.0)
    assert saved == pytest.approx(min(budget.seconds, CREDIT_SHARE * 0.050))
    again = allow(DECODE, goal, MODEL, saved)
    assert carry(again, goal, saved, spent=again.seconds + saved) == 0
    assert carry(allow(IDLE, goal, MODEL), goal, saved, 0.0) == 0


def test_min_share_gives_finetuning_its_part_whatever_the_objective():
    goal = Objectives.of(1, None, min_share=0.2)
    for load in (DECODE, StepLoad(8, 0, 4000, num_waiting=5)):
        budget = allow(load, goal, MODEL)
        assert budget.seconds / (budget.seconds + budget.predicted) == pytest.approx(0.2)


def test_min_share_does_not_reduce_what_the_objective_leaves():
    goal = Objectives.of(500, None)
    small = Objectives.of(500, None, min_share=0.01)
    assert allow(DECODE, small, MODEL).seconds == allow(DECODE, goal, MODEL).seconds


def test_before_anything_is_known_a_step_is_filled_with_care():
    """By the bound: the prior may be several times too fast."""
    model = LatencyModel(PRIOR)
    budget = allow(IDLE, Objectives(), model)
    tokens = budget.seconds / model.prices()[Feature.CHUNK]
    assert tokens * PRIOR[Feature.CHUNK] < 0.25 * budget.seconds
    assert tokens > 16


def test_features_of_a_load_are_its_numbers():
    features = StepLoad(3, 100, 5000, 2).features()
    assert features[[Feature.STEP, Feature.DECODE, Feature.PREFILL, Feature.CONTEXT]].tolist() == [
        1, 3, 100, 5000,
    ]  # fmt: skip
    assert not np.any(IDLE.features())
