"""Paired ratios of the overhead benchmark."""

from __future__ import annotations

import pytest

from benchmarks.overhead import overheads, turn


def test_overhead_is_the_median_of_paired_ratios() -> None:
    plain = [{"decode": 1.0, "prefill": 2.0}, {"decode": 2.0, "prefill": 2.0}] * 2
    plugin = [
        {"decode": 1.1, "prefill": 2.0},
        {"decode": 2.2, "prefill": 2.0},
        {"decode": 1.1, "prefill": 9.0},  # an outlier
        {"decode": 2.2, "prefill": 2.0},
    ]
    found = overheads({"plugin": plugin, "plain": plain}, "plugin", "plain")
    assert found["decode"] == pytest.approx(0.1)
    assert found["prefill"] == pytest.approx(0.0)
    assert found["all"] == pytest.approx(0.1)


def test_every_engine_goes_first_equally_often() -> None:
    kinds = ["a", "b", "c"]
    orders = [turn(kinds, i) for i in range(6)]
    assert all(sorted(order) == kinds for order in orders)
    assert sorted(order[0] for order in orders) == ["a", "a", "b", "b", "c", "c"]
