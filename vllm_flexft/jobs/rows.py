"""The parts of the job store's transactions: each runs inside one that the caller opened."""

from __future__ import annotations

import json
import sqlite3
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vllm_flexft.config import FinetuneJob
from vllm_flexft.jobs.owner import provably_dead
from vllm_flexft.jobs.records import (
    JobRecord,
    LeaseLostError,
    NameInUseError,
    Version,
    differing_keys,
)
from vllm_flexft.jobs.states import FINISHED, JobStatus, check_transition


def new_id() -> str:
    return f"ftjob-{uuid.uuid4().hex[:16]}"


def get_job(conn: sqlite3.Connection, job_id: str) -> JobRecord:
    """Raises KeyError if there is none."""
    row = conn.execute("SELECT * FROM jobs WHERE id = ?", (job_id,)).fetchone()
    if row is None:
        raise KeyError(f"no job {job_id!r}")
    return JobRecord.from_row(row)


def to_version(row: sqlite3.Row) -> Version:
    return Version(**dict(row) | {"final": bool(row["final"]), "retired": bool(row["retired"])})


def to_json(config: Mapping[str, Any]) -> str:
    return json.dumps(config, allow_nan=False)


def add_event(conn: sqlite3.Connection, job_id: str, level: str, message: str) -> None:
    conn.execute(
        "INSERT INTO events (job_id, created_at, level, message) VALUES (?, ?, ?, ?)",
        (job_id, time.time(), level, message),
    )


def insert_job(
    conn: sqlite3.Connection, job: FinetuneJob, config: Mapping[str, Any], model: str
) -> JobRecord:
    """Raises NameInUseError if another job writes to the same output folder."""
    # Two jobs in one folder would prune and resume from each other's checkpoints.
    folder = None if job.output_dir is None else str(Path(job.output_dir).resolve())
    row = conn.execute("SELECT name FROM jobs WHERE output_dir = ?", (folder,)).fetchone()
    if row is not None:
        raise NameInUseError(
            f"job {job.name!r}: output_dir {folder} belongs to job {row['name']!r}; "
            "choose another output_dir"
        )
    job_id, now = new_id(), time.time()
    conn.execute(
        "INSERT INTO jobs (id, name, model, status, config, config_hash, output_dir,"
        " created_at, queued_at) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (
            job_id,
            job.name,
            model,
            JobStatus.QUEUED,
            to_json(config),
            job.config_hash(),
            folder,
            now,
            now,
        ),
    )
    add_event(conn, job_id, "info", f"queued for base model {model}")
    return get_job(conn, job_id)


def move(conn: sqlite3.Connection, job: JobRecord, status: JobStatus, **columns: Any) -> None:
    """The one place where a status changes. Leaving `running` gives up the lease."""
    check_transition(job.status, status)
    if status != JobStatus.RUNNING:
        columns |= {"owner": None, "lease_expires": None}
    if job.status in FINISHED:
        columns["queued_at"] = time.time()  # a job that was only released keeps its place
    columns["status"] = status
    assignments = ", ".join(f"{name} = ?" for name in columns)
    conn.execute(f"UPDATE jobs SET {assignments} WHERE id = ?", (*columns.values(), job.id))


def requeue(conn: sqlite3.Connection, job: JobRecord, why: str) -> None:
    """Put a running job back, or end it if its cancellation was requested."""
    if job.cancel_requested:
        move(conn, job, JobStatus.CANCELLED, finished_at=time.time())
        add_event(conn, job.id, "info", f"cancelled ({why})")
    else:
        move(conn, job, JobStatus.QUEUED)
        add_event(conn, job.id, "warning", f"back in the queue at step {job.step}: {why}")


def requeue_if_abandoned(conn: sqlite3.Connection, job: JobRecord, now: float) -> None:
    assert job.owner is not None
    assert job.lease_expires is not None
    if provably_dead(job.owner):
        requeue(conn, job, "its engine died")
    elif job.lease_expires < now:
        requeue(conn, job, "its engine's lease expired")


def check_owner(job: JobRecord, owner: str | None) -> None:
    """Raises LeaseLostError if `owner` is given and does not hold `job`."""
    if owner is not None and job.owner != owner:
        raise LeaseLostError(
            f"job {job.name!r} is {job.status} and no longer held by this engine"
            + (f" but by {job.owner}" if job.owner else "")
        )


def check_same_job(old: JobRecord, job: FinetuneJob, config: Mapping[str, Any], model: str) -> None:
    """Raises NameInUseError, naming every value that differs."""
    differences = [] if old.model == model else [f"base model: {old.model!r} -> {model!r}"]
    if old.config_hash != job.config_hash():
        assert old.config is not None
        differences += differing_keys(old.config, config) or ["its configuration"]
    if differences:
        raise NameInUseError(
            f"the name {job.name!r} belongs to job {old.id} ({old.status}), which differs in "
            f"{'; '.join(differences)}. Give this job another name, or restore those values to "
            "continue the old one"
        )
