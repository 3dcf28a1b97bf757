"""The states of a job and every legal way between them.

    queued ──> running ──> succeeded
      │  ^        │  └───> failed
      │  └────────┤              (running -> queued: released, lease expired, or owner dead)
      └────────┐  │
               v  v
             cancelled

A queued job may also fail: it is looked over when a server starts. A failed or cancelled job is
queued again when the same job is submitted again, and so is a succeeded one whose adapter is gone.
"""

from enum import StrEnum


class JobStatus(StrEnum):
    """Values are those of OpenAI's `fine_tuning.job` object."""

    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


TRANSITIONS: dict[JobStatus, frozenset[JobStatus]] = {
    JobStatus.QUEUED: frozenset({JobStatus.RUNNING, JobStatus.FAILED, JobStatus.CANCELLED}),
    JobStatus.RUNNING: frozenset(
        {JobStatus.QUEUED, JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.CANCELLED}
    ),
    JobStatus.SUCCEEDED: frozenset({JobStatus.QUEUED}),
    JobStatus.FAILED: frozenset({JobStatus.QUEUED}),
    JobStatus.CANCELLED: frozenset({JobStatus.QUEUED}),
}

FINISHED = frozenset({JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.CANCELLED})


def check_transition(old: JobStatus, new: JobStatus) -> None:
    """Raises ValueError unless a job may go from `old` to `new`."""
    if new not in TRANSITIONS[old]:
        legal = ", ".join(sorted(TRANSITIONS[old])) or "none: it is final"
        raise ValueError(f"a {old} job cannot become {new} (legal: {legal})")
