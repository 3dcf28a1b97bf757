"""Jobs named at start: into the queue, and looked over before the first of them trains.

A mistake in the third job would else be found when its turn comes, hours later.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence

from vllm_flexft.config import ServerOptions
from vllm_flexft.jobs.owner import provably_dead
from vllm_flexft.jobs.records import JobRecord
from vllm_flexft.jobs.states import JobStatus
from vllm_flexft.jobs.store import JobStore
from vllm_flexft.publish.adapter_files import CONFIG_FILE
from vllm_flexft.sched.admission import Admission
from vllm_flexft.wiring import CoServeConfig

logger = logging.getLogger("vllm.flexft")

_TOLD_AS = {
    JobStatus.SUCCEEDED: "finished before",
    JobStatus.RUNNING: "in training by another engine",
}


def submit_named(config: CoServeConfig, store: JobStore, model: str) -> Sequence[JobRecord]:
    """Put the jobs named at start into the queue; those that it took."""
    taken = []
    for entry in config.jobs:
        store.forget_refusal(entry.source, entry.name)
        job = entry.job
        if job is None:  # logged by the process that read the file
            store.refuse(entry.name or entry.source, entry.source, one_line(entry.error or ""))
            continue
        try:
            taken.append(store.submit(job.with_output_dir(config.options), model=model))
        except ValueError as error:
            logger.error("Finetune job %s is refused: %s", entry.label, error)
            store.refuse(job.name, entry.source, one_line(str(error)))
    return taken


def look_over(
    named: Sequence[JobRecord],
    config: CoServeConfig,
    store: JobStore,
    model: str,
    admission: Admission,
    check: Callable[[], None],
) -> None:
    """Refuse those of the jobs that wait which cannot run, and say what waits.

    `check` is called while this waits for data; what it raises ends this.
    """
    for record in named:
        if record.status == JobStatus.QUEUED:
            mistakes = _mistakes(record, config.options, admission, check)
            if mistakes and store.reject(record.id, "; ".join(map(one_line, mistakes))):
                for mistake in mistakes:
                    logger.error("Finetune job %s is refused: %s", record.name, mistake)
    told = Counter(_told_as(store.get(record.id).status) for record in named)
    told["refused (see above)"] += len(config.jobs) - len(named)
    if config.jobs:
        parts = ", ".join(f"{count} {what}" for what, count in told.items() if count)
        logger.info("%s: %s", _jobs(len(config.jobs)), parts)
    _tell_of_earlier_jobs(named, config.options, store, model)


def one_line(text: str) -> str:
    return "; ".join(text.splitlines())


def _mistakes(
    record: JobRecord, options: ServerOptions, admission: Admission, check: Callable[[], None]
) -> Sequence[str]:
    job = record.job()
    output_dir = job.resolve_output_dir(options)
    if (output_dir / CONFIG_FILE).exists():
        return ()  # an adapter is there: it may be this job's, which then needs no data any more
    return admission.review(job, output_dir, check)


def _told_as(status: JobStatus) -> str:
    if status == JobStatus.FAILED:
        return "refused (see above)"
    return _TOLD_AS.get(status, str(status))


def _tell_of_earlier_jobs(
    named: Sequence[JobRecord], options: ServerOptions, store: JobStore, model: str
) -> None:
    ids = {record.id for record in named}
    waiting = [
        record.name
        for record in store.list()
        if record.model == model and record.id not in ids and _waits(record)
    ]
    if waiting:
        where = ""
        if options.state_dir != ServerOptions().state_dir:
            where = f" --state-dir {options.state_dir}"
        logger.info(
            "%s of earlier commands wait%s too: %s; `flexft cancel NAME%s` drops one",
            _jobs(len(waiting)), "s" * (len(waiting) == 1), ", ".join(waiting), where,
        )  # fmt: skip


def _waits(record: JobRecord) -> bool:
    if record.status == JobStatus.RUNNING:
        return record.owner is not None and provably_dead(record.owner)
    return record.status == JobStatus.QUEUED


def _jobs(count: int) -> str:
    return f"{count} job{'s' * (count != 1)}"
