"""The thread between job store and scheduler, with a real store and no engine."""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from vllm_flexft.config import FinetuneJob, ServerOptions
from vllm_flexft.jobs.owner import new_owner
from vllm_flexft.jobs.store import JobStore
from vllm_flexft.plan import Written
from vllm_flexft.sched import feed as feed_module
from vllm_flexft.sched.admission import EngineLimits
from vllm_flexft.sched.feed import JobFeed
from vllm_flexft.sched.prepared import PreparedJob
from vllm_flexft.sched.progress import EndRecord, StepRecord, WrittenRecord
from vllm_flexft.wiring import CoServeConfig, job_store_path


@pytest.fixture
def store(tmp_path: Path) -> JobStore:
    return JobStore(job_store_path(ServerOptions(state_dir=tmp_path / "state")))


@pytest.fixture
def feed(
    tmp_path: Path,
    model_config: Any,
    engine_limits: EngineLimits,
    store: JobStore,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[JobFeed]:
    monkeypatch.setattr(feed_module, "POLL_S", 0.01)
    monkeypatch.setattr(feed_module, "RETRY_S", 0.05)
    options = ServerOptions(state_dir=tmp_path / "state")
    config = CoServeConfig((), options, 1, 1, frozenset())
    thread = JobFeed(config, model_config, engine_limits)
    thread.start()
    yield thread
    thread.stop()


def submit(store: JobStore, folder: Path, name: str, rows: int = 3) -> str:
    path = folder / f"{name}.jsonl"
    lines = [json.dumps({"prompt": f"say {i}", "completion": f" it is {i}"}) for i in range(rows)]
    path.write_text("\n".join(lines))
    job = FinetuneJob.from_mapping(
        {"name": name, "dataset": {"path": str(path)}, "output_dir": str(folder / name)}
    )
    return store.submit(job, model="model").id


def wait(condition: Callable[[], Any], seconds: float = 60.0) -> Any:
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, "did not happen"
        time.sleep(0.005)
    return value


def take(feed: JobFeed) -> PreparedJob:
    wait(feed.has_ready)
    prepared = feed.take()
    assert prepared is not None
    return prepared


def step_record(step: int) -> StepRecord:
    return StepRecord(step, 0.1, 2.5, 1e-3, 0.7, 10, 20, 20, 0.5)


def test_jobs_come_one_at_a_time_in_their_order(
    feed: JobFeed, store: JobStore, tmp_path: Path
) -> None:
    ids = [submit(store, tmp_path, name) for name in ("a", "b")]
    first = take(feed)
    time.sleep(0.1)
    assert feed.take() is None
    assert store.get(ids[1]).status == "queued"
    feed.report(first, EndRecord())
    assert [first.job_id, take(feed).job_id] == ids


def test_the_engine_is_woken_when_a_job_is_ready(
    feed: JobFeed, store: JobStore, tmp_path: Path
) -> None:
    woken: list[bool] = []
    feed.wake = lambda: woken.append(feed.has_ready())
    submit(store, tmp_path, "a")
    wait(lambda: woken)
    assert woken == [True]


def test_a_refused_job_does_not_hold_up_the_next(
    feed: JobFeed, store: JobStore, tmp_path: Path
) -> None:
    bad = submit(store, tmp_path, "bad", rows=0)
    good = submit(store, tmp_path, "good")
    assert take(feed).job_id == good
    record = store.get(bad)
    assert record.status == "failed"
    assert "bad.jsonl" in record.error
    assert "empty" in record.error


def test_records_reach_the_store_and_the_output_folder(
    feed: JobFeed, store: JobStore, tmp_path: Path
) -> None:
    job_id = submit(store, tmp_path, "a")
    prepared = take(feed)
    feed.report(prepared, step_record(1))
    feed.report(prepared, WrittenRecord(Written(1, str(tmp_path / "a/checkpoint-1"), False)))
    feed.report(prepared, WrittenRecord(Written(1, str(tmp_path / "a"), True)))
    feed.report(prepared, EndRecord())
    wait(lambda: store.get(job_id).status == "succeeded")
    assert store.get(job_id).metrics["loss"] == 2.5
    assert [version.name for version in store.versions()] == ["a@step-1", "a"]
    lines = (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1]


def test_a_cancellation_is_seen(feed: JobFeed, store: JobStore, tmp_path: Path) -> None:
    job_id = submit(store, tmp_path, "a")
    prepared = take(feed)
    time.sleep(0.1)
    assert not feed.is_cancelled(job_id)
    store.request_cancel(job_id)
    wait(lambda: feed.is_cancelled(job_id))
    feed.report(prepared, EndRecord(cancelled=True))
    wait(lambda: store.get(job_id).status == "cancelled")


def test_a_cancelled_job_that_is_submitted_again_is_not_cancelled_again(
    feed: JobFeed, store: JobStore, tmp_path: Path
) -> None:
    job_id = submit(store, tmp_path, "a")
    prepared = take(feed)
    store.request_cancel(job_id)
    wait(lambda: feed.is_cancelled(job_id))
    feed.report(prepared, EndRecord(cancelled=True))
    wait(lambda: store.get(job_id).status == "cancelled")
    assert submit(store, tmp_path, "a") == job_id
    assert take(feed).job_id == job_id
    time.sleep(0.7)
    assert not feed.is_cancelled(job_id)


def test_the_end_of_a_job_survives_a_store_that_fails_for_a_while(
    feed: JobFeed, store: JobStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = submit(store, tmp_path, "a")
    prepared = take(feed)
    finish, failures = JobStore.finish, [1, 2, 3]

    def unsteady(*args: Any, **kwargs: Any) -> Any:
        if failures:
            failures.pop()
            raise sqlite3.OperationalError("disk I/O error")
        return finish(*args, **kwargs)

    monkeypatch.setattr(JobStore, "finish", unsteady)
    feed.report(prepared, EndRecord(error="loss is nan"))
    wait(lambda: store.get(job_id).status == "failed")
    assert store.get(job_id).error == "loss is nan"
    assert submit(store, tmp_path, "b")
    assert take(feed).job.name == "b"


def test_an_unfinished_job_goes_back_to_the_queue_when_the_engine_stops(
    feed: JobFeed, store: JobStore, tmp_path: Path
) -> None:
    job_id = submit(store, tmp_path, "a")
    prepared = take(feed)
    feed.report(prepared, step_record(1))
    feed.stop()
    assert store.get(job_id).status == "queued"
    assert store.get(job_id).metrics["step"] == 1


def test_the_folder_of_another_finished_job_is_refused(
    feed: JobFeed, store: JobStore, tmp_path: Path
) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "adapter_config.json").write_text("{}")
    job_id = submit(store, tmp_path, "a")
    wait(lambda: store.get(job_id).status == "failed")
    assert "another output_dir" in store.get(job_id).error
    assert not (tmp_path / "a" / "job.yaml").exists()


def test_a_job_that_another_engine_took_gets_no_more_progress(
    feed: JobFeed, store: JobStore, tmp_path: Path
) -> None:
    job_id = submit(store, tmp_path, "a")
    prepared = take(feed)
    with sqlite3.connect(job_store_path(ServerOptions(state_dir=tmp_path / "state"))) as database:
        database.execute("UPDATE jobs SET lease_expires = 0")
    [taken] = store.lease(new_owner())
    feed.report(prepared, step_record(1))
    wait(lambda: feed.is_cancelled(job_id))
    assert store.get(job_id) == taken


def failing_once(original: Callable[..., Any]) -> Callable[..., Any]:
    failures = [sqlite3.OperationalError("disk I/O error")]

    def call(*args: Any, **kwargs: Any) -> Any:
        if failures:
            raise failures.pop()
        return original(*args, **kwargs)

    return call


def test_a_version_is_announced_though_the_store_failed_once(
    feed: JobFeed, store: JobStore, tmp_path: Path
) -> None:
    job_id = submit(store, tmp_path, "a")
    prepared = take(feed)
    feed._store.add_version = failing_once(feed._store.add_version)
    feed.report(prepared, WrittenRecord(Written(1, str(tmp_path / "a"), True)))
    feed.report(prepared, EndRecord())
    wait(lambda: store.versions())
    assert [version.name for version in store.versions()] == ["a"]
    wait(lambda: store.get(job_id).status == "succeeded")


def test_a_job_that_was_leased_when_the_store_failed_is_taken_again(
    feed: JobFeed, store: JobStore, tmp_path: Path
) -> None:
    wait(lambda: hasattr(feed, "_lease"))
    feed._lease.beat = failing_once(feed._lease.beat)
    job_id = submit(store, tmp_path, "a")
    assert take(feed).job_id == job_id


def test_a_job_is_cancelled_while_its_data_is_tokenised(
    feed: JobFeed, store: JobStore, tmp_path: Path
) -> None:
    job_id = submit(store, tmp_path, "large", rows=300_000)
    wait(lambda: feed._admission.preparer.pid)
    store.request_cancel(job_id)
    wait(lambda: store.get(job_id).status == "cancelled")
    assert feed._admission.preparer.pid is None
    assert not (tmp_path / "large").exists()
    submit(store, tmp_path, "small")
    assert take(feed).job.name == "small"


def test_a_job_whose_data_is_tokenised_goes_back_to_the_queue_when_the_engine_stops(
    feed: JobFeed, store: JobStore, tmp_path: Path
) -> None:
    job_id = submit(store, tmp_path, "large", rows=300_000)
    wait(lambda: feed._admission.preparer.pid)
    feed.stop()
    assert not feed.is_alive()
    assert store.get(job_id).status == "queued"
    assert feed._admission.preparer.pid is None


@pytest.fixture
def unstarted(
    tmp_path: Path, model_config: Any, engine_limits: EngineLimits, monkeypatch: pytest.MonkeyPatch
) -> JobFeed:
    """A feed whose store does not exist yet."""
    monkeypatch.setattr(feed_module, "RETRY_S", 0.05)
    options = ServerOptions(state_dir=tmp_path / "state")
    return JobFeed(CoServeConfig((), options, 1, 1, frozenset()), model_config, engine_limits)


def test_a_damaged_store_is_told_of(unstarted: JobFeed, tmp_path: Path, caplog: Any) -> None:
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "jobs.sqlite3").write_text("no database " * 100)
    unstarted.start()
    wait(lambda: not unstarted.is_alive())
    assert "jobs.sqlite3 is not a job store" in str(unstarted.failure)
    assert "the finetuning queue has stopped" in caplog.text


def test_a_store_that_cannot_be_opened_yet_is_tried_again(
    unstarted: JobFeed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    locked = [sqlite3.OperationalError("database is locked")] * 2

    def open_store(path: Path) -> JobStore:
        if locked:
            raise locked.pop()
        return JobStore(path)

    monkeypatch.setattr(feed_module, "JobStore", open_store)
    unstarted.start()
    submit(JobStore(tmp_path / "state" / "jobs.sqlite3"), tmp_path, "a")
    assert take(unstarted).job.name == "a"
    unstarted.stop()
    assert caplog.text.count("cannot be opened: database is locked") == 2


def test_a_damaged_adapter_in_the_way_refuses_the_job_in_one_line(
    feed: JobFeed, store: JobStore, tmp_path: Path, caplog: Any
) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "adapter_config.json").write_text("{}")
    (tmp_path / "a" / "final.json").write_text("{")
    job_id = submit(store, tmp_path, "a")
    wait(lambda: store.get(job_id).status == "failed")
    assert "final.json is damaged" in store.get(job_id).error
    told = [record for record in caplog.records if record.levelname == "ERROR"]
    assert [record.getMessage().split(":")[0] for record in told] == ["Finetune job a is refused"]
    assert told[0].exc_info is None
