"""`flexft jobs` and `flexft cancel`: the queue of a state_dir, with or without a server on it."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from vllm_flexft.config import ServerOptions
from vllm_flexft.jobs.owner import provably_dead
from vllm_flexft.jobs.records import JobRecord
from vllm_flexft.jobs.states import FINISHED, JobStatus
from vllm_flexft.jobs.store import JobStore
from vllm_flexft.wiring import job_store_path

HEADINGS = ("NAME", "STATE", "STEP", "MODEL", "ADAPTER OR ERROR")


def add_commands(commands: argparse._SubParsersAction) -> None:
    jobs = commands.add_parser("jobs", help="the jobs of a state_dir: state, step, error")
    jobs.set_defaults(run=run_jobs)
    cancel = commands.add_parser("cancel", help="drop a job that waits, stop one that trains")
    cancel.add_argument("name", metavar="NAME")
    cancel.set_defaults(run=run_cancel)
    for parser in (jobs, cancel):
        parser.add_argument(
            "--state-dir",
            type=Path,
            help="the server's state_dir; default: VLLM_FLEXFT_STATE_DIR, or ~/.cache/vllm-flexft",
        )


def run_jobs(arguments: argparse.Namespace) -> int:
    store = _open(arguments.state_dir)
    try:
        records = store.list()
    finally:
        store.close()
    print(table(records) if records else "no jobs")
    return 0


def run_cancel(arguments: argparse.Namespace) -> int:
    store = _open(arguments.state_dir)
    try:
        print(cancel(store, arguments.name))
    finally:
        store.close()
    return 0


def cancel(store: JobStore, name: str) -> str:
    """Cancel a job by name or id; what became of it. Raises ValueError where there is none."""
    try:
        before = store.get(name)
    except KeyError:
        names = ", ".join(r.name for r in store.list() if not r.refused) or "none"
        raise ValueError(f"no job {name!r}; there are: {names}") from None
    if before.status in FINISHED:
        raise ValueError(f"job {before.name!r} has already ended: {before.status}")
    after = store.request_cancel(before.id)
    if after.status == JobStatus.RUNNING:
        if _interrupted(after):
            return f"{after.name}: dropped when the next server for its model starts"
        return f"{after.name}: its server stops it within a second or two"
    return f"{after.name}: {after.status}"


def table(records: Sequence[JobRecord]) -> str:
    """A line a job, oldest first, in columns."""
    lines = [HEADINGS, *map(_cells, records)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(HEADINGS) - 1)]
    return "\n".join(
        "  ".join([*(cell.ljust(w) for cell, w in zip(line, widths, strict=False)), line[-1]])
        for line in lines
    )


def _cells(record: JobRecord) -> tuple[str, ...]:
    state = str(record.status)
    if record.refused:
        state = "refused"
    elif _interrupted(record):
        state = "interrupted"  # goes on when a server for its model starts
    elif record.cancel_requested and record.status == JobStatus.RUNNING:
        state = "cancelling"
    step = f"{record.step}/{record.total_steps}" if record.total_steps else "-"
    last = record.error or (record.config or {}).get("output_dir") or "-"
    return record.name, state, step, record.model or "-", " ".join(str(last).split())


def _interrupted(record: JobRecord) -> bool:
    return record.owner is not None and provably_dead(record.owner)


def _open(state_dir: Path | None) -> JobStore:
    """Raises ValueError where there is no store: looking must not make one."""
    options = ServerOptions() if state_dir is None else ServerOptions(state_dir=state_dir)
    path = job_store_path(options)
    if not path.is_file():
        raise ValueError(f"no jobs here: no such file {path}; --state-dir names the server's")
    return JobStore(path)
