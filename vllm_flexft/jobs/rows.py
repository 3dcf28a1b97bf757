"""The parts of the job store's transactions: each runs inside one that the caller opened."""

from __future__ import annotations

import json
import logging
import sqlite3
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vllm_flexft.config import FinetuneJob
from vllm_flexft.config.job import what_is_trained
from vllm_flexft.jobs.owner import provably_dead
from vllm_flexft.jobs.records import (
    JobRecord,
    LeaseLostError,
    NameInUseError,
    Version,
    differing_keys,
)
from vllm_flexft.jobs.states import FINISHED, JobStatus, check_transition

logger = logging.getLogger("vllm.flexft")

# Of a job that got no further than when its engine was last gone. More than an unlucky user's
# kill -9s, or a machine's bad day; few enough that requests are soon served in peace.
MAX_REQUEUES = 3
ADAPTER_FILE = "adapter_config.json"  # without it there is no adapter for PEFT and vLLM


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
    """Where that happens again and again without progress, the job fails: it may be what ends the
    engine, and requests with it."""
    assert job.owner is not None
    assert job.lease_expires is not None
    if provably_dead(job.owner):
        why = "its engine died"
    elif job.lease_expires < now:
        why = "its engine's lease expired"
    else:
        return
    [(deaths,)] = conn.execute(
        "UPDATE jobs SET death_step = step,"
        " deaths = CASE WHEN COALESCE(death_step, 0) = step THEN deaths + 1 ELSE 0 END"
        " WHERE id = ? RETURNING deaths",
        (job.id,),
    ).fetchall()
    if deaths <= MAX_REQUEUES or job.cancel_requested:
        requeue(conn, job, why)
        return
    error = (
        f"the server died {deaths} times in a row and never got beyond step {job.step}; a job that "
        "needs too much memory does that: look for the cause in the server's log and the "
        "system's, lower memory_gib or dataset.max_length, then submit the job again"
    )
    logger.error("Finetune job %s is given up: %s", job.name, error)
    move(conn, job, JobStatus.FAILED, error=error, finished_at=now)
    add_event(conn, job.id, "error", error)


def requeue_if_adapter_gone(conn: sqlite3.Connection, job: JobRecord) -> None:
    """A finished job whose adapter is no longer in its folder: it is trained once more."""
    row = conn.execute("SELECT path FROM versions WHERE job_id = ? AND final", (job.id,)).fetchone()
    if row is None or Path(row["path"], ADAPTER_FILE).exists():
        return
    why = f"submitted again after it had finished: there is no adapter in {row['path']} any more"
    logger.warning("[%s] is trained again: %s", job.name, why)
    conn.execute("UPDATE versions SET retired = 1 WHERE job_id = ? AND final", (job.id,))
    queue_again(conn, job, why, step=0, metrics="{}")


def queue_again(conn: sqlite3.Connection, job: JobRecord, why: str, **columns: Any) -> None:
    """A job that had ended."""
    columns |= {"error": None, "cancel_requested": 0, "finished_at": None, "deaths": 0}
    move(conn, job, JobStatus.QUEUED, **columns)
    add_event(conn, job.id, "info", why)


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
        trained = what_is_trained(old.config), what_is_trained(config)
        differences += differing_keys(*trained) or ["its configuration"]
    if differences:
        raise NameInUseError(
            f"the name {job.name!r} belongs to job {old.id} ({old.status}), which differs in "
            f"{'; '.join(differences)}. Give this job another name, or restore those values to "
            "continue the old one"
        )
