"""What the job store hands out: frozen rows, and its errors."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vllm_flexft.config import FinetuneJob, JobError
from vllm_flexft.jobs.states import JobStatus


class NameInUseError(JobError):
    """A job, output folder or served name is already taken by something different."""


class LeaseLostError(RuntimeError):
    """An engine wrote to a job that it no longer holds; it must stop working on it."""


@dataclass(frozen=True)
class JobRecord:
    """One row of the queue. Times are seconds since the epoch."""

    id: str
    name: str
    model: str | None  # base model; None for a refused job
    status: JobStatus
    config: Mapping[str, Any] | None  # every default filled in; None for a refused job
    config_hash: str | None
    source: str | None  # the file or request a refused job came from
    error: str | None
    owner: str | None
    lease_expires: float | None
    attempts: int  # how often an engine took it
    cancel_requested: bool
    step: int
    total_steps: int | None
    metrics: Mapping[str, Any]  # the latest ones only; metrics.jsonl has them all
    created_at: float
    started_at: float | None
    finished_at: float | None

    @property
    def refused(self) -> bool:
        """True for a job that was never accepted, kept for its error message."""
        return self.config is None

    def job(self) -> FinetuneJob:
        """The validated job. Raises ValueError for a refused one."""
        if self.config is None:
            raise ValueError(f"job {self.name!r} was refused: {self.error}")
        return FinetuneJob.from_mapping(dict(self.config))

    @classmethod
    def from_row(cls, row: sqlite3.Row) -> JobRecord:
        return cls(
            id=row["id"],
            name=row["name"],
            model=row["model"],
            status=JobStatus(row["status"]),
            config=json.loads(row["config"]) if row["config"] else None,
            config_hash=row["config_hash"],
            source=row["source"],
            error=row["error"],
            owner=row["owner"],
            lease_expires=row["lease_expires"],
            attempts=row["attempts"],
            cancel_requested=bool(row["cancel_requested"]),
            step=row["step"],
            total_steps=row["total_steps"],
            metrics=json.loads(row["metrics"]),
            created_at=row["created_at"],
            started_at=row["started_at"],
            finished_at=row["finished_at"],
        )


@dataclass(frozen=True)
class Event:
    """A line of a job's history. `id` grows over all jobs: pass the last one seen as `after`."""

    id: int
    job_id: str
    created_at: float
    level: str
    message: str


@dataclass(frozen=True)
class Version:
    """An adapter that can be served: immutable weights in `path`, under `name`."""

    id: int
    job_id: str
    name: str
    path: str
    step: int
    final: bool
    retired: bool  # its folder was pruned
    created_at: float


def differing_keys(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """`path: old -> new` for every leaf that differs between two nested mappings."""
    lines = []
    for key in sorted(old.keys() | new.keys()):
        a, b = old.get(key), new.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            lines += differing_keys(a, b, f"{prefix}{key}.")
        elif a != b:
            lines.append(f"{prefix}{key}: {a!r} -> {b!r}")
    return lines
