"""Objectives follow from what inference alone keeps."""

from __future__ import annotations

import pytest

from benchmarks.co_serving.calibrate import FACTOR, LEAST_TTFT_S, objectives
from benchmarks.co_serving.client import Answer
from benchmarks.co_serving.measures import Phase, Window, summarise
from benchmarks.co_serving.trace import Arrival


def answers(ttft_s: float) -> list[Answer]:
    """A hundred, one a second, with 10, 20, ... 1000 ms a token."""
    found = []
    for i in range(100):
        first, tpot = i + ttft_s, 0.01 * (i + 1)
        tokens = [(first, 1), (first + tpot, 2)]
        found.append(Answer(Arrival(float(i), 8, 2, "conv"), float(i), tokens, first + tpot))
    return found


def test_objectives_stand_above_what_99_percent_of_requests_get() -> None:
    slo = objectives(answers(ttft_s=3.0), Window(0.0, 0.0, 100.0))
    assert slo.tpot_s == pytest.approx(FACTOR * 0.99)
    assert slo.ttft_s == pytest.approx(FACTOR * 3.0)


def test_inference_alone_attains_the_objectives_that_it_set() -> None:
    window = Window(0.0, 0.0, 100.0)
    slo = objectives(answers(ttft_s=3.0), window)
    assert summarise([Phase(answers(ttft_s=3.0), [], window)], slo).attainment == 1.0


def test_a_fast_server_is_not_held_to_less_than_the_least_time_to_a_first_token() -> None:
    assert objectives(answers(ttft_s=0.1), Window(0.0, 0.0, 100.0)).ttft_s == LEAST_TTFT_S


def test_requests_outside_the_window_do_not_count() -> None:
    slo = objectives(answers(ttft_s=3.0), Window(0.0, 0.0, 50.0))
    assert slo.tpot_s == pytest.approx(FACTOR * 0.5)
