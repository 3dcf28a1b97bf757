"""When tokens are due, against each request's own times."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_flexft.sched.token_times import MAX_LATE, TokenTimes

TPOT_S = 0.05
FIXED = settings(derandomize=True, max_examples=100, deadline=None)


@FIXED
@given(
    st.lists(
        st.tuples(st.sampled_from(["first", "step", "end", "goal"]), st.floats(0, 0.06)),
        max_size=80,
    ),
    st.integers(0, 2),
)
def test_a_step_is_due_when_the_first_of_its_requests_is(events: list, ahead: int) -> None:
    """`ahead` steps are planned already when a first token comes."""
    times, now, tpot = TokenTimes(TPOT_S), 50.0, TPOT_S
    requests: dict[str, tuple[float, int]] = {}  # first token, and tokens planned after it
    for number, (event, wait) in enumerate(events):
        now += wait
        if event == "first":
            requests[str(number)] = (now, ahead)
            times.first_token(str(number), now, ahead)
        elif event == "step":
            times.step()
            requests = {name: (start, count + 1) for name, (start, count) in requests.items()}
        elif event == "end" and requests:
            del requests[name := min(requests)]
            times.ended([name, "never seen"])
        due = min((start + (count + 1) * tpot for start, count in requests.values()), default=None)
        if due is None:
            assert times.due(now) == math.inf
        elif due >= now - MAX_LATE * tpot:
            assert times.due(now) == pytest.approx(due, abs=1e-9)
        else:
            return  # lost: the next test


def test_a_request_that_is_hopelessly_late_holds_the_others_up_for_a_few_steps_only() -> None:
    times, now = TokenTimes(TPOT_S), 0.0
    times.first_token("slow", now)
    times.step()
    now += 60.0
    assert times.due(now) == now - MAX_LATE * TPOT_S
    for _ in range(math.ceil(MAX_LATE) + 1):  # steps of no length
        times.step()
    assert times.due(now) >= now


def test_another_objective_holds_from_the_next_token_on() -> None:
    times = TokenTimes(TPOT_S)
    times.first_token("one", 10.0)
    times.step()
    assert times.due(10.05) == pytest.approx(10.1)
    times.set_objective(2 * TPOT_S)
    assert times.due(10.05) == pytest.approx(10.15)  # 0.05 for the first, 0.1 for the next
