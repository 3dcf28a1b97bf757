"""Jobs in training share what inference leaves, by weight."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_flexft.sched.fair_share import FairShare


def shares(weights: dict[str, float], steps: int) -> dict[str, float]:
    """Work that each job gets when the first in order takes all of a step."""
    share = FairShare()
    for job_id, weight in weights.items():
        share.add(job_id, weight)
    total = dict.fromkeys(weights, 0.0)
    for _ in range(steps):
        first = share.order(weights)[0]
        total[first] += 1.0
        share.charge({first: 1.0})
    return total


@settings(derandomize=True, deadline=None)
@given(st.lists(st.floats(0.1, 10.0), min_size=2, max_size=5))
def test_work_is_in_proportion_to_weight(weights):
    by_job = {f"job-{i}": weight for i, weight in enumerate(weights)}
    got = shares(by_job, steps=2000)
    for job_id, weight in by_job.items():
        assert got[job_id] / 2000 == pytest.approx(weight / sum(weights), abs=0.02)


def test_new_job_does_not_make_up_for_the_time_before_it_came():
    share = FairShare()
    share.add("old", 1.0)
    share.charge({"old": 100.0})
    share.add("new", 1.0)
    share.charge({"new": 1.0})
    assert share.order(["new", "old"])[0] == "old"


def test_job_that_cannot_use_its_turn_does_not_save_it_up():
    share = FairShare()
    share.add("busy", 1.0)
    share.add("stuck", 1.0)
    for _ in range(50):
        share.charge({"busy": 1.0, "stuck": 0.0})
    share.charge({"busy": 0.0, "stuck": 1.0})
    assert share.order(["busy", "stuck"])[0] == "busy"
