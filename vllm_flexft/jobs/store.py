"""The job queue on disk. API servers submit, cancel and read; one engine leases and reports.

Every method is one transaction; any number of processes and threads may call them. What an
engine writes can be fenced with `owner=`: LeaseLostError then says that another engine has
taken the job meanwhile.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vllm_flexft.config import FinetuneJob
from vllm_flexft.jobs.database import Database
from vllm_flexft.jobs.records import Event, JobRecord, NameInUseError, Version
from vllm_flexft.jobs.rows import (
    add_event,
    check_owner,
    check_same_job,
    get_job,
    insert_job,
    move,
    new_id,
    queue_again,
    requeue,
    requeue_if_abandoned,
    requeue_if_adapter_gone,
    to_json,
    to_version,
)
from vllm_flexft.jobs.states import FINISHED, JobStatus
from vllm_flexft.obs.jsonsafe import flag_non_finite

# An engine beats every few seconds; 30 s outlast a slow step or a long compilation. A local
# owner that died is noticed at once, whatever is left of its lease.
LEASE_S = 30.0

_ACCEPTED_BY_NAME = "SELECT * FROM jobs WHERE name = ? AND config IS NOT NULL"


class JobStore:
    """The queue in the SQLite file `path`, created with its folder where missing.

    Raises ValueError when the file is not a job store, or one of a newer version.
    """

    def __init__(self, path: Path, *, lease_s: float = LEASE_S) -> None:
        self._db = Database(Path(path))
        self._lease_s = lease_s

    def close(self) -> None:
        self._db.close()

    # ---- API servers and CLI -------------------------------------------------------------

    def submit(self, job: FinetuneJob, *, model: str) -> JobRecord:
        """Queue `job` for training on the base model `model`. Idempotent by name.

        The same job again: queued or running returns the existing record (a running one whose
        owner died goes back to the queue, or fails if that happened too often), failed or
        cancelled is queued once more and resumes from its last checkpoint, and so is a succeeded
        one whose adapter is gone from its folder. What is not trained (`slo`, say) is taken from
        the new submission.
        Raises NameInUseError if the name belongs to a different job, or the output folder to
        another job.
        """
        config, now = job.model_dump(mode="json"), time.time()
        with self._db.write() as conn:
            row = conn.execute(_ACCEPTED_BY_NAME, (job.name,)).fetchone()
            if row is None:
                return insert_job(conn, job, config, model)
            old = JobRecord.from_row(row)
            check_same_job(old, job, config, model)
            conn.execute("UPDATE jobs SET config = ? WHERE id = ?", (to_json(config), old.id))
            if old.status == JobStatus.RUNNING:
                requeue_if_abandoned(conn, old, now)
            elif old.status in (JobStatus.FAILED, JobStatus.CANCELLED):
                queue_again(conn, old, f"submitted again after it was {old.status}")
            elif old.status == JobStatus.SUCCEEDED:
                requeue_if_adapter_gone(conn, old)
            return get_job(conn, old.id)

    def refuse(self, name: str, source: str, error: str) -> JobRecord:
        """Keep a job that could not be accepted as a failed one, with its message.

        It blocks nobody's name. Refusing the same name from the same source again replaces the
        earlier record, so that a server restarted with a bad file does not pile them up.
        """
        now, job_id = time.time(), new_id()
        with self._db.write() as conn:
            conn.execute(
                "DELETE FROM jobs WHERE config IS NULL AND name = ? AND source = ?", (name, source)
            )
            conn.execute(
                "INSERT INTO jobs (id, name, status, source, error, created_at, queued_at,"
                " finished_at) VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                (job_id, name, JobStatus.FAILED, source, error, now, now, now),
            )
            add_event(conn, job_id, "error", error)
            return get_job(conn, job_id)

    def reject(self, job_id: str, error: str) -> bool:
        """Fail a job that waits, before any engine took it. False if one has, or it has ended."""
        with self._db.write() as conn:
            job = get_job(conn, job_id)
            if job.status != JobStatus.QUEUED:
                return False
            move(conn, job, JobStatus.FAILED, error=error, finished_at=time.time())
            add_event(conn, job_id, "error", error)
            return True

    def forget_refusal(self, source: str, name: str | None) -> None:
        """Drop what `refuse` kept for this source, under its own name or the job's."""
        with self._db.write() as conn:
            conn.execute(
                "DELETE FROM jobs WHERE config IS NULL AND source = ?1 AND name IN (?1, ?2)",
                (source, name),
            )

    def get(self, id_or_name: str) -> JobRecord:
        """Raises KeyError if there is none. A name means its accepted job or last refusal."""
        rows = self._db.read(
            "SELECT * FROM jobs WHERE id = ?1 OR name = ?1"
            " ORDER BY id = ?1 DESC, config IS NOT NULL DESC, seq DESC LIMIT 1",
            id_or_name,
        )
        if not rows:
            raise KeyError(f"no job {id_or_name!r}")
        return JobRecord.from_row(rows[0])

    def list(self, status: JobStatus | None = None) -> Sequence[JobRecord]:
        """Oldest first."""
        where, args = ("", ()) if status is None else (" WHERE status = ?", (str(status),))
        return [
            JobRecord.from_row(r)
            for r in self._db.read(f"SELECT * FROM jobs{where} ORDER BY seq", *args)
        ]

    def request_cancel(self, job_id: str) -> JobRecord:
        """Cancel a queued job now and a running one as soon as its engine sees the request.

        A finished job is left as it is.
        """
        with self._db.write() as conn:
            job = get_job(conn, job_id)
            if job.status == JobStatus.QUEUED:
                move(conn, job, JobStatus.CANCELLED, finished_at=time.time())
                add_event(conn, job.id, "info", "cancelled before it started")
            elif job.status == JobStatus.RUNNING and not job.cancel_requested:
                conn.execute("UPDATE jobs SET cancel_requested = 1 WHERE id = ?", (job.id,))
                add_event(conn, job.id, "info", "cancellation requested")
            return get_job(conn, job_id)

    def events(self, job_id: str, after: int = 0) -> Sequence[Event]:
        rows = self._db.read(
            "SELECT * FROM events WHERE job_id = ? AND id > ? ORDER BY id", job_id, after
        )
        return [Event(**dict(r)) for r in rows]

    def versions(self, after_id: int = 0) -> Sequence[Version]:
        """Every adapter version with a larger id, retired ones included, oldest first."""
        rows = self._db.read("SELECT * FROM versions WHERE id > ? ORDER BY id", after_id)
        return [to_version(r) for r in rows]

    # ---- the engine ----------------------------------------------------------------------

    def lease(self, owner: str, limit: int = 1, *, model: str | None = None) -> Sequence[JobRecord]:
        """Take up to `limit` jobs, by priority and age: queued ones, and running ones left behind.

        A running job is left behind when its lease expired or its owner is provably dead.
        `model` restricts to jobs of that base model.
        """
        now = time.time()
        with self._db.write() as conn:
            for row in conn.execute("SELECT * FROM jobs WHERE status = 'running'").fetchall():
                if row["owner"] != owner:
                    requeue_if_abandoned(conn, JobRecord.from_row(row), now)
            rows = conn.execute(
                "SELECT * FROM jobs WHERE status = 'queued' AND (?1 IS NULL OR model = ?1)"
                " ORDER BY COALESCE(json_extract(config, '$.priority'), 0) DESC, queued_at, seq"
                " LIMIT ?2",
                (model, limit),
            ).fetchall()
            leased = []
            for job in map(JobRecord.from_row, rows):
                move(
                    conn,
                    job,
                    JobStatus.RUNNING,
                    owner=owner,
                    lease_expires=now + self._lease_s,
                    attempts=job.attempts + 1,
                    started_at=job.started_at or now,
                )
                leased.append(get_job(conn, job.id))
            return leased

    def heartbeat(self, owner: str) -> Sequence[str]:
        """Extend all leases of `owner`; the ids of the jobs that it still holds.

        A job missing from the answer was taken by another engine: stop working on it.
        """
        with self._db.write(durable=False) as conn:
            rows = conn.execute(
                "UPDATE jobs SET lease_expires = ? WHERE owner = ? RETURNING id",
                (time.time() + self._lease_s, owner),
            ).fetchall()
            return [r["id"] for r in rows]

    def release(self, job_id: str, owner: str) -> JobRecord:
        """Give a running job back to the queue, as at a graceful shutdown.

        A job whose cancellation was requested meanwhile is cancelled.
        Raises LeaseLostError if `owner` does not hold it.
        """
        with self._db.write() as conn:
            job = get_job(conn, job_id)
            check_owner(job, owner)
            requeue(conn, job, "released by its engine")
            return get_job(conn, job_id)

    def finish(
        self, job_id: str, status: JobStatus, error: str | None = None, *, owner: str | None = None
    ) -> JobRecord:
        """End a running job (or a queued one, as cancelled).

        Raises LeaseLostError if `owner` is given and does not hold it, ValueError if the job
        has already ended.
        """
        status = JobStatus(status)
        assert status in FINISHED, f"{status} is not an end"
        with self._db.write() as conn:
            job = get_job(conn, job_id)
            check_owner(job, owner)
            move(conn, job, status, error=error, finished_at=time.time())
            add_event(conn, job_id, "error" if error else "info", error or str(status))
            return get_job(conn, job_id)

    def progress(
        self,
        job_id: str,
        step: int,
        total_steps: int,
        metrics: Mapping[str, Any],
        *,
        owner: str | None = None,
    ) -> None:
        """Keep the latest metrics. Called once per optimizer step, so it waits for no disk."""
        with self._db.write(durable=False) as conn:
            check_owner(get_job(conn, job_id), owner)
            conn.execute(
                "UPDATE jobs SET step = ?, total_steps = ?, metrics = ? WHERE id = ?",
                (step, total_steps, json.dumps(flag_non_finite(metrics), allow_nan=False), job_id),
            )

    def cancel_requested(self, job_id: str) -> bool:
        return self.get(job_id).cancel_requested

    def add_event(self, job_id: str, level: str, message: str) -> None:
        with self._db.write() as conn:
            add_event(conn, job_id, level, message)

    def add_version(self, job_id: str, name: str, path: str, step: int, final: bool) -> Version:
        """Announce an adapter folder to be served under `name`.

        Repeating it is harmless; one that was retired is served anew. Raises NameInUseError if
        `name` means another folder.
        """
        with self._db.write() as conn:
            row = conn.execute("SELECT * FROM versions WHERE name = ?", (name,)).fetchone()
            if row is not None and row["path"] != str(path):
                raise NameInUseError(
                    f"the served name {name!r} already means the adapter in {row['path']}; "
                    f"{path} needs another name"
                )
            if row is not None and row["retired"]:
                # A new row, since vLLM's number of the adapter derives from it.
                conn.execute("DELETE FROM versions WHERE id = ?", (row["id"],))
                row = None
            if row is None:
                conn.execute(
                    "INSERT INTO versions (job_id, name, path, step, final, created_at)"
                    " VALUES (?, ?, ?, ?, ?, ?)",
                    (job_id, name, str(path), step, int(final), time.time()),
                )
                row = conn.execute("SELECT * FROM versions WHERE name = ?", (name,)).fetchone()
            return to_version(row)

    def retire_versions(self, paths: Iterable[str | Path]) -> None:
        """Mark the versions in these folders as gone (their checkpoints were pruned)."""
        with self._db.write() as conn:
            conn.executemany(
                "UPDATE versions SET retired = 1 WHERE path = ?", [(str(p),) for p in paths]
            )
