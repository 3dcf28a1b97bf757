"""A burst shows in how requests become more, before any of them waits."""

from __future__ import annotations

import pytest

from vllm_flexft.sched.growth import MEMORY_S, TREND, Growth


def after(growth: Growth, seconds: float, requests: float, a_second: float, start: float) -> float:
    """What it says at the end of `seconds` of steps of 20 ms, requests changing steadily."""
    for step in range(round(seconds / 0.02)):
        passed = 0.02 * (step + 1)
        growth.update(start + passed, round(requests + a_second * passed))
    return growth.rate


def test_a_steady_rise_is_told_by_its_pace() -> None:
    growth = Growth()
    growth.update(0.0, 0)
    pace = after(growth, 5 * MEMORY_S, 0, 8.0, 0.0)
    assert pace + TREND / MEMORY_S == pytest.approx(8.0, abs=0.8)


def test_there_is_none_while_as_many_go_as_come_or_more() -> None:
    growth = Growth()
    growth.update(0.0, 20)
    assert after(growth, 3.0, 20, 0.0, 0.0) == pytest.approx(0.0, abs=1e-6)
    assert after(growth, 3.0, 20, -5.0, 3.0) == 0.0


def test_a_burst_is_forgotten_in_a_few_seconds() -> None:
    growth = Growth()
    after(growth, 3.0, 4, 0.0, 0.0)
    growth.update(3.02, 12)
    assert growth.rate > 4.0 / MEMORY_S
    assert after(growth, 3 * MEMORY_S, 12, 0.0, 3.02) == 0.0


def test_one_request_more_is_no_burst() -> None:
    growth = Growth()
    after(growth, 3.0, 4, 0.0, 0.0)
    growth.update(3.02, 5)
    assert growth.rate == 0.0


def test_what_is_there_after_a_pause_did_not_just_come() -> None:
    growth = Growth()
    growth.update(0.0, 0)
    growth.update(600.0, 30)
    assert growth.rate == 0.0
