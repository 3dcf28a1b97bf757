"""What counts as attained, and which tokens count as trained."""

from __future__ import annotations

import math

import pytest

from benchmarks.co_serving.client import Answer
from benchmarks.co_serving.measures import (
    Phase,
    Slo,
    Update,
    Window,
    finetune_tps,
    quantile,
    summarise,
)
from benchmarks.co_serving.trace import Arrival

SLO = Slo(tpot_s=0.1, ttft_s=1.0)


def answer(due: float, *tokens: tuple[float, int], error: str | None = None) -> Answer:
    """`tokens`: seconds after `due`, and count so far."""
    times = [(due + at, count) for at, count in tokens]
    ended = times[-1][0] if times else due + 3.0
    return Answer(Arrival(due, 8, 4, "conv"), due, times, ended, error)


GOOD = ((0.5, 1), (0.6, 2), (0.7, 3))


def test_time_per_output_token_begins_at_the_first_token() -> None:
    assert answer(10.0, *GOOD).ttft_s == pytest.approx(0.5)
    assert answer(10.0, *GOOD).tpot_s == pytest.approx(0.1)


def test_messages_with_several_tokens_count_each_of_them() -> None:
    assert answer(0.0, (0.5, 1), (0.9, 5)).tpot_s == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("given", "met"),
    [
        (answer(0.0, (0.5, 1), (0.55, 2)), True),
        (answer(0.0, (1.5, 1), (1.55, 2)), False),  # too late
        (answer(0.0, (0.5, 1), (0.7, 2)), False),  # too slow
        (answer(0.0, (0.5, 1), (0.55, 2), error="cut off"), False),
        (answer(0.0, error="cut off"), False),
    ],
)
def test_a_request_meets_both_objectives_and_is_complete_or_it_misses(
    given: Answer, met: bool
) -> None:
    assert SLO.met(given) is met


@pytest.mark.parametrize(
    ("came_s", "ended_s", "attainment"),
    [(3.0, 3.1, 1.0), (3.7, 3.8, 0.0), (3.0, 9.0, 0.0)],
    ids=["in time", "too slow", "stuck"],
)
def test_a_long_answer_that_was_cut_off_is_judged_by_what_came(
    came_s: float, ended_s: float, attainment: float
) -> None:
    cut = answer(1.0, (0.5, 1), (came_s, 32), error="cut off")
    cut.ended = 1.0 + ended_s
    assert summarise([Phase([cut], [], Window(0.0, 0.0, 5.0))], SLO).attainment == attainment


def test_only_requests_that_came_in_the_window_are_counted() -> None:
    answers = [answer(at, (0.5, 1), (0.55, 2)) for at in (0.0, 4.0, 6.0, 9.0)]
    answers.append(answer(5.0, error="cut off"))
    result = summarise([Phase(answers, [], Window(0.0, 4.0, 8.0))], SLO)
    assert (result.requests, result.complete) == (3, 2)
    assert result.attainment == pytest.approx(2 / 3)
    assert result.goodput_rps == pytest.approx(0.5)
    assert result.output_tps == pytest.approx(1.0)  # two answers of two tokens in 4 s
    assert result.ttft_p99_ms == pytest.approx(3000)  # the one cut off, as long as it waited


def test_quantiles_take_a_measured_value() -> None:
    values = list(range(1, 101))
    assert quantile(values, 0.99) == 99
    assert quantile(values, 0.5) == 50
    assert quantile([7.0], 0.99) == 7.0
    assert math.isnan(quantile([], 0.5))


def test_tokens_count_once_their_update_is_done() -> None:
    steady = [Update(float(at), 100) for at in range(2, 41, 2)]  # 50 a second
    assert finetune_tps(steady, Window(0.0, 5.0, 35.0)) == pytest.approx(50.0)


def test_a_window_without_an_update_trained_nothing() -> None:
    around = [Update(4.0, 100), Update(40.0, 100)]
    assert finetune_tps(around, Window(0.0, 5.0, 35.0)) == 0.0


def test_a_step_that_reaches_into_the_window_counts_by_its_part_of_it() -> None:
    # 100 tokens in 4 s, of which 3 lie inside; then 100 in 2 s, of which 1 does: in 4 s
    updates = [Update(4.0, 100), Update(6.0, 100)]
    assert finetune_tps(updates, Window(0.0, 1.0, 5.0)) == pytest.approx((75 + 50) / 4)


def test_steps_of_an_earlier_phase_do_not_count() -> None:
    updates = [Update(-3.0, 10_000), Update(2.0, 100), Update(4.0, 100)]
    assert finetune_tps(updates, Window(0.0, 0.0, 4.0)) == pytest.approx(50.0)


def test_two_windows_of_a_system_count_as_one_twice_as_long() -> None:
    def phase(began: float, ttft_s: float) -> Phase:
        answers = [answer(began + at, (ttft_s, 1), (ttft_s + 0.05, 2)) for at in range(4)]
        updates = [Update(began + at, 100) for at in range(1, 9)]
        return Phase(answers, updates, Window(began, began, began + 4.0))

    both = summarise([phase(0.0, 0.1), phase(100.0, 9.0)], SLO)
    assert both.requests == 8
    assert both.attainment == 0.5
    assert both.goodput_rps == pytest.approx(4 / 8)
    assert both.finetune_tps == pytest.approx(100.0)
    assert both.ttft_p99_ms == pytest.approx(9000.0)
