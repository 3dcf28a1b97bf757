"""vllm_flexft/jobs/states.py"""

import itertools

import pytest

from vllm_flexft.jobs.states import FINISHED, TRANSITIONS, JobStatus, check_transition

# The promise, written down a second time: (from, to).
LEGAL = {
    ("queued", "running"),
    ("queued", "cancelled"),
    ("queued", "failed"),
    ("running", "queued"),
    ("running", "succeeded"),
    ("running", "failed"),
    ("running", "cancelled"),
    ("failed", "queued"),
    ("cancelled", "queued"),
    ("succeeded", "queued"),
}


@pytest.mark.parametrize(("old", "new"), list(itertools.product(JobStatus, JobStatus)))
def test_only_listed_transitions_are_legal(old: JobStatus, new: JobStatus) -> None:
    if (old.value, new.value) in LEGAL:
        check_transition(old, new)
    else:
        with pytest.raises(ValueError, match=f"a {old} job cannot become {new}"):
            check_transition(old, new)


def test_a_job_that_ended_can_only_be_queued_again() -> None:
    assert all(TRANSITIONS[end] == {JobStatus.QUEUED} for end in FINISHED)
