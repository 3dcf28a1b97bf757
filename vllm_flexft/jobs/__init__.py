"""The durable job queue: one SQLite file that API servers write to and one engine leases from."""

from vllm_flexft.jobs.owner import new_owner
from vllm_flexft.jobs.records import Event, JobRecord, LeaseLostError, NameInUseError, Version
from vllm_flexft.jobs.states import JobStatus
from vllm_flexft.jobs.store import JobStore

__all__ = [
    "Event",
    "JobRecord",
    "JobStatus",
    "JobStore",
    "LeaseLostError",
    "NameInUseError",
    "Version",
    "new_owner",
]
