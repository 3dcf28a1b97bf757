"""Jobs named at start, with a real store, real files and the tokenising process."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from vllm_flexft.config import FinetuneJob, ServerOptions
from vllm_flexft.jobs.owner import new_owner
from vllm_flexft.jobs.store import JobStore
from vllm_flexft.sched.admission import Admission, EngineLimits
from vllm_flexft.sched.intake import look_over, submit_named
from vllm_flexft.wiring import CoServeConfig, JobEntry, job_store_path


@pytest.fixture(scope="module")
def admission(model_config: Any, engine_limits: EngineLimits) -> Iterator[Admission]:
    admission = Admission(model_config, engine_limits, frozenset({"served"}))
    yield admission
    admission.preparer.close()


@pytest.fixture
def options(tmp_path: Path) -> ServerOptions:
    return ServerOptions(state_dir=tmp_path / "state")


@pytest.fixture
def store(options: ServerOptions) -> JobStore:
    return JobStore(job_store_path(options))


@pytest.fixture(autouse=True)
def _every_message(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)


def job(tmp_path: Path, name: str, text: str | None = None, **sections: Any) -> FinetuneJob:
    rows = tmp_path / f"{name}.jsonl"
    good = json.dumps({"prompt": "one", "completion": " two"}) + "\n"
    rows.write_text(good if text is None else text)
    return FinetuneJob.from_mapping({"name": name, "dataset": {"path": str(rows)}, **sections})


def start(
    store: JobStore, options: ServerOptions, admission: Admission, *jobs: FinetuneJob | JobEntry
) -> None:
    entries = (
        j if isinstance(j, JobEntry) else JobEntry(f"{j.name}.yaml", job=j, name=j.name)
        for j in jobs
    )
    config = CoServeConfig(tuple(entries), options, 1, 1, frozenset())
    named = submit_named(config, store, "model")
    look_over(named, config, store, "model", admission, lambda: None)


def messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records]


def test_bad_jobs_are_refused_before_any_trains_and_good_ones_wait(
    tmp_path: Path, store: JobStore, options: ServerOptions, admission: Admission, caplog: Any
) -> None:
    jobs = {
        "good": job(tmp_path, "good"),
        "empty": job(tmp_path, "empty", ""),
        "columns": job(tmp_path, "columns", '{"q": "a"}\n'),
        "broken": job(tmp_path, "broken", '{"prompt": "a", "completion": "b"}\n{"prompt"\n'),
        "rank": job(tmp_path, "rank", peft={"r": 64}),
        "layers": job(tmp_path, "layers", peft={"layers_to_transform": [99]}),
        "long": job(tmp_path, "long"),
        "folder": job(tmp_path, "folder", output_dir=str(tmp_path / "good.jsonl" / "out")),
        "served": job(tmp_path, "served"),
        "valid": job(tmp_path, "valid", validation={"path": str(tmp_path / "none.jsonl")}),
    }
    long = jobs["long"].dataset.model_copy(update={"max_length": 5000})
    jobs["long"] = jobs["long"].model_copy(update={"dataset": long})
    unread = JobEntry("bad.yaml", error="lora: unknown key")
    start(store, options, admission, *jobs.values(), unread)
    expected = {
        "empty": "the dataset is empty",
        "columns": "no known format has these columns: q",
        "broken": "line 2, column",
        "rank": "peft.r: 64 is more than the --max-lora-rank 16",
        "layers": "99",
        "long": "max_length 5000",
        "folder": "output_dir: .*good.jsonl is no folder",
        "served": "name: 'served' is already used",
        "valid": "none.jsonl: no such file",
    }
    assert store.get("good").status == "queued"
    told = messages(caplog)
    for name, pattern in expected.items():
        assert store.get(name).status == "failed"
        lines = [line for line in told if line.startswith(f"Finetune job {name} is refused: ")]
        assert len(lines) == 1
        assert re.search(pattern, lines[0]), lines[0]
    assert told[-1] == "11 jobs: 1 queued, 10 refused (see above)"
    assert store.get("bad.yaml").error == "lora: unknown key"


def test_each_mistake_of_a_job_is_a_line(
    tmp_path: Path, store: JobStore, options: ServerOptions, admission: Admission, caplog: Any
) -> None:
    start(store, options, admission, job(tmp_path, "a", "", peft={"r": 64}))
    refused = [line for line in messages(caplog) if "is refused" in line]
    assert [("peft.r" in line, "is empty" in line) for line in refused] == [
        (True, False),
        (False, True),
    ]
    assert "peft.r" in store.get("a").error
    assert "is empty" in store.get("a").error


def test_only_the_first_rows_are_read(
    tmp_path: Path, store: JobStore, options: ServerOptions, admission: Admission
) -> None:
    text = (json.dumps({"prompt": "one", "completion": " two"}) + "\n") * 1000 + "{"
    start(store, options, admission, job(tmp_path, "a", text))
    assert store.get("a").status == "queued"


def test_a_job_mended_and_named_again_waits_and_its_refusal_is_forgotten(
    tmp_path: Path, store: JobStore, options: ServerOptions, admission: Admission
) -> None:
    wanted = job(tmp_path, "a", "")
    start(store, options, admission, wanted, JobEntry("b.yaml", error="no name"))
    assert store.get("a").status == "failed"
    mended = job(tmp_path, "b")
    start(store, options, admission, job(tmp_path, "a"), JobEntry("b.yaml", job=mended, name="b"))
    assert {r.name: r.status for r in store.list()} == {"a": "queued", "b": "queued"}


def test_jobs_of_earlier_commands_are_named(
    tmp_path: Path, store: JobStore, options: ServerOptions, admission: Admission, caplog: Any
) -> None:
    for name, model in (("old", "model"), ("done", "model"), ("foreign", "other")):
        store.submit(job(tmp_path, name).with_output_dir(options), model=model)
    store.request_cancel(store.get("done").id)
    start(store, options, admission, job(tmp_path, "new"))
    assert messages(caplog)[-1] == (
        "1 job of earlier commands waits too: old; "
        f"`flexft cancel NAME --state-dir {options.state_dir}` drops one"
    )
    caplog.clear()
    start(store, options, admission)
    assert messages(caplog) == [
        "2 jobs of earlier commands wait too: old, new; "
        f"`flexft cancel NAME --state-dir {options.state_dir}` drops one"
    ]


def test_a_job_in_training_by_another_engine_is_left_alone(
    tmp_path: Path, store: JobStore, options: ServerOptions, admission: Admission, caplog: Any
) -> None:
    wanted = job(tmp_path, "a")
    store.submit(wanted.with_output_dir(options), model="model")
    store.lease(new_owner())
    (tmp_path / "a.jsonl").unlink()
    start(store, options, admission, wanted)
    assert store.get("a").status == "running"
    assert messages(caplog) == ["1 job: 1 in training by another engine"]
