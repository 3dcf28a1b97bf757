from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_flexft.sched.planner import TPOT_MARGIN, TTFT_SHARE, Planner, StepLoad

settings.register_profile("fixed", derandomize=True, max_examples=200)
settings.load_profile("fixed")

IDLE = StepLoad(0, 0, 0)
seconds = st.floats(1e-6, 10.0)
loads = st.builds(
    StepLoad, st.integers(0, 8192), st.integers(0, 256), st.sampled_from([0, 0, 0, 1, 50])
)
observations = st.lists(st.tuples(loads, st.floats(0, 1e5), seconds), max_size=30)


def learnt(tpot_ms: float, observed: list) -> Planner:
    planner = Planner.for_objectives(tpot_ms, None)
    for load, units, took in observed:
        planner.observe(load, units, took)
    return planner


@given(st.floats(1, 1e4), observations, loads)
def test_budget_is_finite_and_never_negative(tpot_ms: float, observed: list, load: StepLoad):
    assert 0 <= learnt(tpot_ms, observed).budget(load) < float("inf")


@given(observations, st.integers(0, 8192), st.integers(1, 50))
def test_waiting_requests_leave_no_budget(observed: list, tokens: int, waiting: int):
    planner = learnt(1e4, observed)
    assert planner.budget(StepLoad(tokens, 4, waiting)) == 0


@given(observations, loads)
def test_a_step_planned_to_its_budget_keeps_the_objective(observed: list, load: StepLoad):
    planner = learnt(50, observed)
    units = planner.budget(load)
    if load.num_tokens and units and planner.unit_s is not None:
        assert planner.predict(load) + units * planner.unit_s <= 0.050 * TPOT_MARGIN * (1 + 1e-9)


def test_a_step_without_requests_lasts_at_most_a_part_of_the_first_token_objective():
    planner = Planner.for_objectives(None, 2000)
    planner.observe(IDLE, 100.0, 0.1)
    assert planner.budget(IDLE) * planner.unit_s == 2.0 * TTFT_SHARE


def test_inference_that_needs_all_of_the_objective_leaves_no_budget():
    decode = StepLoad(8, 8, 0)
    planner = Planner.for_objectives(50, None)
    planner.observe(IDLE, 100.0, 0.1)
    planner.observe(decode, 0.0, 0.045)
    assert planner.budget(decode) == 0


def test_the_cost_of_a_unit_is_learnt_beside_requests():
    decode = StepLoad(8, 8, 0)
    planner = Planner.for_objectives(50, None)
    for _ in range(50):
        planner.observe(decode, 0.0, 0.010)
        planner.observe(decode, 20.0, 0.010 + 20 * 0.001)
    assert abs(planner.unit_s - 0.001) < 1e-4
    assert abs(planner.budget(decode) - 30) < 3  # 40 ms of 50, less 10, at 1 ms a unit


def test_before_any_cost_is_known_a_step_with_requests_tries_a_little():
    assert 0 < Planner.for_objectives(50, None).budget(StepLoad(8, 8, 0)) <= 32


def test_small_noisy_steps_hardly_move_the_cost_of_a_unit():
    """A few tokens' worth of work measured beside a slow step, or a fast one."""
    decode = StepLoad(8, 8, 0)
    planner = Planner.for_objectives(50, None)
    planner.observe(decode, 0.0, 0.010)
    for _ in range(10):
        planner.observe(decode, 1000.0, 0.010 + 1.0)
    for took in (0.002, 0.030, 0.002, 0.002):
        planner.observe(decode, 1.0, took)
    assert 0.0009 < planner.unit_s < 0.0012
