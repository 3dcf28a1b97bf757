"""What the latency model promises, against a machine with known costs."""

from __future__ import annotations

import json
import math
import time

import numpy as np
import pytest
from harness.plant import COSTS, PRIOR, Plant
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from vllm_flexft.sched.latency import COVERAGE, NUM_FEATURES, Feature, LatencyModel, Vector

FIXED = settings(derandomize=True, max_examples=60, deadline=None)
amounts = arrays.arrays(np.float64, NUM_FEATURES, elements=st.integers(0, 1000))


def learn(model: LatencyModel, plant: Plant, steps: int, **kind: object) -> None:
    for _ in range(steps):
        features = plant.step(**kind)  # type: ignore[arg-type]
        model.observe(features, plant.seconds(features))


def errors(model: LatencyModel, plant: Plant, steps: int = 200) -> Vector:
    """Relative, against the machine without noise."""
    steps_ = [plant.step() for _ in range(steps)]
    return np.array([model.mean(f) / plant.mean(f) - 1.0 for f in steps_])


@pytest.mark.parametrize("seed", range(5))
def test_thirty_steps_are_enough_to_predict_within_a_tenth(seed: int):
    model, plant = LatencyModel(PRIOR), Plant(seed)
    learn(model, plant, 30)
    assert np.median(np.abs(errors(model, plant))) < 0.10


@pytest.mark.parametrize("seed", range(5))
def test_the_mean_error_stays_below_a_few_percent_under_noise_and_outliers(seed: int):
    model, plant = LatencyModel(PRIOR), Plant(seed, noise=0.1, outliers=0.02)
    learn(model, plant, 500)
    assert np.median(np.abs(errors(model, plant))) < 0.06


def test_one_step_of_inference_corrects_what_finetuning_is_thought_to_cost():
    """The machine is slower than the prior says at one thing, so likely at all."""
    model, plant = LatencyModel(COSTS / 10), Plant(noise=0.0)
    features = plant.step(finetune=False)
    chunk = np.zeros(NUM_FEATURES)
    chunk[Feature.CHUNK] = 100
    assert model.mean(chunk) == pytest.approx(0.1 * plant.mean(chunk))
    model.observe(features, plant.seconds(features))
    assert 0.5 < model.mean(chunk) / plant.mean(chunk) < 1.5


@pytest.mark.parametrize("factor", [1e-3, 0.05, 20.0, 1e3])
def test_a_prior_that_is_far_off_does_not_make_unseen_work_unaffordable(factor: float):
    """The price of finetuning after inference alone, on a machine nothing like the supposed one."""
    model, plant = LatencyModel(PRIOR * factor), Plant(noise=0.05)
    learn(model, plant, 30, finetune=False)
    ratio = model.prices() / COSTS
    for feature in (Feature.CHUNK, Feature.LAYER, Feature.LOSS):
        assert 0.3 < ratio[feature] < 10


def test_what_is_known_well_is_not_priced_lower_by_optimism_and_what_is_not_seen_is():
    model, plant = LatencyModel(PRIOR), Plant(noise=0.05)
    learn(model, plant, 500)
    known = model.prices(optimistic=True) / model.prices()
    learn(model, plant, 10_000, finetune=False)
    unseen = model.prices(optimistic=True) / model.prices()
    assert known[Feature.LAYER] > 0.6
    assert unseen[Feature.LAYER] < 0.4


@pytest.mark.parametrize("seed", range(5))
def test_upper_bounds_hold_for_about_the_promised_part_of_steps(seed: int):
    model, plant = LatencyModel(PRIOR), Plant(seed, noise=0.08, outliers=0.01)
    learn(model, plant, 200)
    held = []
    for _ in range(1500):
        features = plant.step()
        seconds = plant.seconds(features)
        held.append(seconds <= model.predict(features)[1])
        model.observe(features, seconds)
    assert COVERAGE - 0.02 <= np.mean(held) <= COVERAGE + 0.025


def test_bounds_are_not_far_above_what_steps_take():
    """A bound that promises nothing would hold too."""
    model, plant = LatencyModel(PRIOR), Plant(noise=0.05)
    learn(model, plant, 300)
    widths = []
    for _ in range(200):
        mean, bound = model.predict(plant.step())
        widths.append(bound / mean)
    assert np.median(widths) < 1.2


def test_a_single_outlier_hardly_moves_a_prediction():
    model, plant = LatencyModel(PRIOR), Plant(noise=0.05)
    learn(model, plant, 300)
    features = plant.step()
    before = model.mean(features)
    model.observe(features, 50 * before)
    assert model.mean(features) / before < 1.10


@pytest.mark.parametrize("slowness", [2.0, 0.5, 4.0])
@pytest.mark.parametrize("finetune", [True, False])
def test_a_change_of_clock_is_followed_within_fifty_steps(slowness: float, finetune: bool):
    """Also what is not seen while it changes: finetuning may have been off."""
    model, plant = LatencyModel(PRIOR), Plant(noise=0.05)
    learn(model, plant, 500)
    plant.slowness = slowness
    learn(model, plant, 50, finetune=finetune)
    error = errors(model, plant)
    assert abs(np.median(error)) < 0.10
    assert np.median(np.abs(error)) < 0.15


def test_a_change_of_load_is_followed_within_fifty_steps():
    """From a few decode rows to many, where the machine is not linear: a row costs half."""
    model, plant = LatencyModel(PRIOR), Plant(noise=0.05)
    learn(model, plant, 500, rows=(1, 4))

    def seconds(features: Vector) -> float:
        cheaper = features.copy()
        cheaper[Feature.DECODE] *= 0.5
        return plant.seconds(cheaper)

    error = []
    for step in range(150):
        features = plant.step(rows=(100, 200))
        took = seconds(features)
        if step >= 50:
            error.append(model.mean(features) / took - 1.0)
        model.observe(features, took)
    assert np.median(np.abs(error)) < 0.10


def test_a_cost_that_was_not_seen_for_long_is_not_forgotten():
    model, plant = LatencyModel(PRIOR), Plant(noise=0.05)
    learn(model, plant, 500)
    before = model.prices()[Feature.LAYER]
    learn(model, plant, 5000, finetune=False)
    assert 0.7 < model.prices()[Feature.LAYER] / before < 1.5


@FIXED
@given(amounts, amounts, st.integers(0, 60))
def test_prices_bound_what_more_work_adds_to_the_upper_bound(a: Vector, b: Vector, steps: int):
    """The planner fills a step by prices and relies on the bound of the whole."""
    model = LatencyModel(PRIOR)
    learn(model, Plant(1), steps)
    _, alone = model.predict(a)
    _, together = model.predict(a + b)
    assert together <= alone + float(model.prices() @ b) + 1e-9


@FIXED
@given(st.lists(st.tuples(amounts, st.floats(1e-6, 1e4)), max_size=40))
def test_predictions_stay_positive_and_finite_whatever_is_observed(steps: list):
    model = LatencyModel(PRIOR)
    for features, seconds in steps:
        model.observe(features, seconds)
    one = np.ones(NUM_FEATURES)
    mean, bound = model.predict(one)
    assert 0 < mean <= bound < math.inf
    assert (model.prices() > 0).all()


@pytest.mark.parametrize("seconds", [math.nan, math.inf, 0.0, -1.0])
def test_a_time_that_cannot_be_is_ignored(seconds: float):
    model, features = LatencyModel(PRIOR), np.ones(NUM_FEATURES)
    before = model.predict(features)
    model.observe(features, seconds)
    assert model.predict(features) == before


def test_state_survives_json_and_starts_the_next_model_warm():
    model, plant = LatencyModel(PRIOR), Plant(noise=0.05)
    learn(model, plant, 300)
    warm = LatencyModel(PRIOR)
    warm.restore(json.loads(json.dumps(model.state())))
    features = plant.step()
    assert warm.mean(features) == pytest.approx(model.mean(features))
    assert np.median(np.abs(errors(warm, plant))) < 0.05


BROKEN = {
    "no key": lambda s: s.pop("theta"),
    "other features": lambda s: s.update(theta=[1.0, 2.0]),
    "not a number": lambda s: s.update(noise="loud"),
    "nan": lambda s: s["theta"].__setitem__(0, math.nan),
    "negative cost": lambda s: s["theta"].__setitem__(0, -1.0),
    "no covariance": lambda s: s.update(p=(-np.eye(NUM_FEATURES)).tolist()),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_a_state_that_makes_no_sense_is_refused_and_changes_nothing(broken: str):
    model, features = LatencyModel(PRIOR), np.ones(NUM_FEATURES)
    state = model.state()
    BROKEN[broken](state)
    before = model.predict(features)
    with pytest.raises(ValueError, match="latency model"):
        model.restore(state)
    assert model.predict(features) == before


def test_predicting_and_observing_take_tens_of_microseconds():
    """The fastest of many, so that a busy machine does not fail it."""
    model, plant = LatencyModel(PRIOR), Plant()
    features, best = plant.step(), math.inf
    for _ in range(300):
        started = time.perf_counter()
        model.predict(features)
        model.prices()
        model.observe(features, 0.02)
        best = min(best, time.perf_counter() - started)
    assert best < 100e-6
