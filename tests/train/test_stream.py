"""The backward beside the forwards: what shares memory waits for each other, and nothing is lost.

The engine is real and runs on CPU; its streams only keep the books of a GPU's.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from harness.gradients import Case, Row, _cut_up, _send_request
from harness.peft_reference import write_rows
from harness.traced_streams import TracedStreams, traced

from vllm_flexft.train.results import Results

ROWS = [Row(i * 311, 90, 20 * i % 130 + 60) for i in range(6)]
# A lane holds a sequence or two, and a step some slices: lanes, blocks and the slot change hands
# from one step to the next.
CUT = Case(tuple(ROWS), window=61, lane_tokens=120, budgets=(900.0, 260.0))
SHARED = {"lane", "block", "slot", "master"}


@pytest.fixture
def job(bench: Any, tmp_path: Path) -> Callable[..., Path]:
    """Trains three optimizer steps among requests; returns the job's output folder."""
    dataset = write_rows(tmp_path / "rows.jsonl", [row.text() for row in ROWS])

    def run(*, evaluated: bool = True, **training: Any) -> Path:
        description: dict[str, Any] = {
            "dataset": {"path": str(dataset), "max_length": 120, "shuffle": False},
            "peft": {"r": 4},
            "training": {
                "max_steps": 3,
                "train_batch_size": 6,
                "save_steps": 2,
                "save_total_limit": 5,
                "learning_rate": 1e-3,
                **training,
            },
        }

        if evaluated:
            description["validation"] = {**description["dataset"], "every_steps": 1}
            del description["validation"]["shuffle"]

        def on_step(engine: Any, step: int) -> None:
            if step % 4 == 1:
                _send_request(engine, step)
            if step == 6:
                engine.scheduler._drafts.take_back()
                (job,) = engine.scheduler._runs
                job.release_blocks(engine.scheduler._lender)

        with _cut_up(CUT):
            return bench("llama")._run(description, on_step)

    return run


@pytest.fixture
def streams(bench: Any) -> Iterator[TracedStreams]:
    with traced(bench("llama").runner) as streams:
        yield streams


def lines(folder: Path) -> list[dict[str, Any]]:
    kept = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    timed = ("time", "tokens_per_second")
    return [{k: v for k, v in line.items() if k not in timed} for line in kept]


def test_nothing_shared_is_touched_at_once_and_slices_are_one_step_late_at_most(job, streams):
    job()
    assert streams.races == set()
    assert streams.most_late == 1
    assert {kind for kind, _ in streams._seen} == SHARED


def test_what_is_learnt_and_reported_is_what_one_stream_learns_and_reports(job, bench):
    """Losses and norms come steps later; each is reported once, under its own step."""
    from safetensors.torch import load_file

    alone = job()
    with traced(bench("llama").runner):
        beside = job()
    assert lines(beside) == lines(alone)
    for name in ("checkpoint-2", "checkpoint-3", "."):
        a, b = (load_file(x / name / "adapter_model.safetensors") for x in (alone, beside))
        assert all(torch.equal(a[key], b[key]) for key in a)


def test_slices_that_do_not_wait_for_their_forward_race(job, streams, monkeypatch):
    monkeypatch.setattr(TracedStreams, "backward_waits", lambda self: None)
    job()
    assert {"lane", "block", "slot"} <= streams.raced


def test_forwards_that_do_not_wait_for_slices_race_and_leave_them_behind(job, streams, monkeypatch):
    monkeypatch.setattr(TracedStreams, "forward_waits", lambda self, mark: None)
    job()
    assert {"lane", "block", "slot"} <= streams.raced
    assert streams.most_late > 1


def test_a_snapshot_that_does_not_wait_for_the_update_races(job, streams, monkeypatch):
    settle = Results.settle
    monkeypatch.setattr(Results, "settle", lambda self, *, wait: settle(self, wait=False))
    job(evaluated=False)
    assert streams.raced == {"master"}


@pytest.mark.parametrize("kind", ["lane", "block", "slot"])
def test_each_kind_of_sharing_alone_makes_a_forward_wait(kind, job, streams, monkeypatch):
    """The forwards are told of nothing else, and what they are told of is safe."""
    from vllm_flexft.runner import hook

    whole = hook.touched

    def one_kind(*args: Any) -> set[Any]:
        return {x for x in whole(*args) if (x[0] if isinstance(x, tuple) else "block") == kind}

    monkeypatch.setattr(hook, "touched", one_kind)
    job()
    assert kind not in streams.raced


def test_forwards_that_are_told_of_nothing_race(job, streams, monkeypatch):
    """Also where slices are one step late at most: blocks, lanes and slot change hands at once."""
    from vllm_flexft.runner import hook

    monkeypatch.setattr(hook, "touched", lambda *_: set())
    job()
    assert {"lane", "block", "slot"} <= streams.raced
    assert streams.most_late == 1


def test_memory_of_a_closed_job_is_given_back_after_its_last_slice(job, streams, monkeypatch):
    from vllm_flexft.runner.opened_job import OpenedJob

    known = []
    close = OpenedJob.close

    def closed(self: Any) -> None:
        close(self)
        known.append(
            streams.clocks["forward"]["backward"] >= streams.clocks["backward"]["backward"]
        )

    monkeypatch.setattr(OpenedJob, "close", closed)
    job()
    assert known == [True]


def test_a_job_that_diverged_steps_ago_is_failed_and_publishes_nothing(job, streams, bench):
    with pytest.raises(AssertionError, match="diverged"):
        job(learning_rate=1e30, save_steps=100)
    assert streams.forwards
    store = bench("llama").engine.store
    (failed,) = (x for x in store.list("failed") if "diverged" in (x.error or ""))
    assert not [v for v in store.versions() if v.job_id == failed.id]
