"""Room for finetuning: never more than the objectives leave, by the model's upper bound."""

from __future__ import annotations

import numpy as np
import pytest
from harness.plant import PRIOR, Plant
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_flexft.config import ServerOptions, SLOConfig
from vllm_flexft.sched.latency import Feature, LatencyModel
from vllm_flexft.sched.planner import (
    CREDIT_SHARE,
    HORIZON_S,
    MIN_SHARE_CREDIT_S,
    TTFT_SHARE,
    Objectives,
    StepLoad,
    allow,
    carry,
)
from vllm_flexft.sched.token_times import TokenTimes

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
    load: StepLoad, objectives: Objectives, due_s: float, steps: int
):
    budget = allow(load, objectives, learnt(steps), due_s=due_s)
    assert 0 <= budget.seconds < float("inf")
    if load.num_tokens and budget.seconds:
        assert budget.bound + budget.seconds <= min(objectives.step_s, due_s) + 1e-12
        assert budget.bound + budget.seconds + budget.credit <= due_s + 1e-12
        assert budget.credit <= CREDIT_SHARE * objectives.tpot_s


@FIXED
@given(loads, objectives, st.floats(0, 1))
def test_nothing_is_allowed_while_requests_wait_that_could_run(
    load: StepLoad, objectives: Objectives, due_s: float
):
    waiting = StepLoad(load.decode_rows, load.prefill_tokens, load.context, num_waiting=1)
    budget = allow(waiting, objectives, MODEL, due_s=due_s)
    assert budget.seconds == 0
    assert budget.credit == 0
    assert "wait" in budget.reason


def test_a_step_without_requests_lasts_at_most_a_part_of_the_first_token_objective():
    budget = allow(IDLE, Objectives.of(None, 2000), MODEL)
    assert budget.seconds == TTFT_SHARE * 2.0
    assert budget.idle


def test_inference_that_needs_all_of_the_objective_leaves_nothing_and_says_so():
    budget = allow(DECODE, Objectives.of(5, None), MODEL, due_s=1.0)
    assert budget.seconds == budget.credit == 0
    assert "TPOT" in budget.reason


@FIXED
@given(
    st.lists(st.tuples(st.integers(0, 3), st.floats(0, 1), st.booleans()), min_size=1, max_size=60),
    st.floats(0.02, 0.5),
)
def test_a_step_with_finetuning_ends_before_the_next_token_of_any_request_is_due(
    steps: list, tpot_s: float
):
    """However much of budget and credit each step spends, whatever came before it."""
    goal = Objectives(tpot_s)
    times, now = TokenTimes(goal.step_s), 100.0
    running: dict[str, list[float]] = {}  # request -> times of its tokens
    for number, (load, part, stalls) in enumerate(steps):
        prefill = (0, 0, 500, 2000)[load]
        budget = allow(
            StepLoad(len(running), prefill, 4000), goal, MODEL, due_s=times.due(now) - now
        )
        spent = part * (budget.seconds + budget.credit)
        times.step()
        now += budget.bound + spent + 0.3 * stalls
        for tokens in running.values():
            tokens.append(now)
        if budget.seconds and not budget.idle and not stalls:
            for tokens in running.values():
                assert tokens[-1] - tokens[0] <= (len(tokens) - 1) * goal.step_s + 1e-9
        if load:
            running[str(number)] = [now]
            times.first_token(str(number), now)
        if len(running) > 4:
            first = next(iter(running))
            del running[first]
            times.ended([first])


def test_of_several_jobs_the_strictest_objectives_hold_and_a_jobs_own_go_first():
    options = ServerOptions.from_mapping({"tpot_ms": 40, "ttft_ms": 900, "min_share": 0.1})
    assert Objectives.strictest(options, []) == Objectives(0.04, 0.9, 0.1)
    assert Objectives.strictest(options, [None]) == Objectives(0.04, 0.9, 0.1)
    slow, fast = SLOConfig(tpot_ms=80), SLOConfig(tpot_ms=60, ttft_ms=300)
    assert Objectives.strictest(options, [slow]) == Objectives(0.08, 0.9, 0.1)
    assert Objectives.strictest(options, [slow, fast]) == Objectives(0.06, 0.3, 0.1)


def test_nothing_is_left_while_requests_become_so_many_that_some_will_soon_wait():
    goal = Objectives(tpot_s=0.1)
    steady = allow(DECODE, goal, MODEL, due_s=9.0, growth=15.9 / HORIZON_S, rows=16)
    assert steady.seconds == allow(DECODE, goal, MODEL, due_s=9.0).seconds > 0.0
    held = allow(DECODE, goal, MODEL, due_s=9.0, growth=16.1 / HORIZON_S, rows=16)
    assert held.seconds == held.credit == 0.0
    assert held.reason == "requests become more"


def test_a_full_batch_holds_nothing_back_while_nobody_comes():
    """Chunks find no row, but slices, updates and snapshots need none."""
    assert allow(DECODE, Objectives(tpot_s=0.1), MODEL, growth=0.0, rows=0).seconds > 0.0
    assert allow(DECODE, Objectives(tpot_s=0.1), MODEL, growth=0.01, rows=0).seconds > 0.0


def test_nothing_is_left_while_requests_become_so_many_that_all_would_soon_be_slow():
    """Places enough, but each request makes the step longer."""
    goal = Objectives(tpot_s=0.02)
    slack = allow(DECODE, goal, MODEL).seconds
    row = MODEL.mean(StepLoad(9, 0, 4500).amounts) - MODEL.mean(DECODE.amounts)
    load = StepLoad(8, 0, 4000, num_requests=8)
    for part, held in ((0.98, False), (1.02, True)):
        budget = allow(load, goal, MODEL, growth=part * slack / row / HORIZON_S)
        assert (budget.seconds == 0.0) is held


def test_credit_is_what_all_requests_have_saved():
    goal = Objectives.of(50, None)
    fresh = allow(DECODE, goal, MODEL, due_s=goal.step_s)
    assert fresh.credit == 0
    saved = allow(DECODE, goal, MODEL, due_s=goal.step_s + 0.02)
    assert (saved.seconds, saved.credit) == (fresh.seconds, pytest.approx(0.02))
    assert allow(DECODE, goal, MODEL, due_s=9.0).credit == CREDIT_SHARE * goal.tpot_s
    assert allow(DECODE, goal, MODEL).credit == 0  # nobody is in decode


def test_a_late_request_is_given_back_what_it_lost():
    goal = Objectives.of(50, None)
    late = allow(DECODE, goal, MODEL, due_s=goal.step_s - 0.01)
    assert late.seconds == pytest.approx(allow(DECODE, goal, MODEL).seconds - 0.01)
    assert allow(DECODE, goal, MODEL, due_s=-1.0).seconds == 0


def test_a_min_share_that_no_piece_of_work_fits_is_saved_for_it():
    goal, saved = Objectives.of(1, None, min_share=0.2), 0.0
    for _ in range(1000):
        budget = allow(DECODE, goal, MODEL, share_credit=saved)
        assert budget.credit == saved
        saved = carry(budget, goal, saved, spent=0.0)
    assert saved == MIN_SHARE_CREDIT_S
    assert carry(allow(DECODE, Objectives(), MODEL), Objectives(), saved, 0.0) == 0


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
