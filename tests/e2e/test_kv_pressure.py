"""Finetuning gives way: to requests that need memory, to pauses, resets and cancellation."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from harness.beside import check_same, job, weights
from harness.engine import CoServingEngine
from harness.health import Health, health
from harness.traffic import Ask, PlanLog, Pump, ended, random_prompts, train

from vllm_flexft.inprocess import wait_for_jobs

BLOCKS = 12  # of 128 tokens, beside vLLM's null block


@pytest.fixture(scope="module")
def engine(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> CoServingEngine:
    return CoServingEngine(
        tiny_llama,
        tmp_path_factory.mktemp("state"),
        options={"tpot_ms": 1000},
        max_num_seqs=8,
        num_gpu_blocks_override=BLOCKS + 1,
        enable_prefix_caching=False,
    )


@pytest.fixture(scope="module")
def undisturbed(
    engine: CoServingEngine, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, torch.Tensor], Health]:
    folder = tmp_path_factory.mktemp("undisturbed")
    record, _ = train(engine, job(folder))
    assert record.status == "succeeded", record.error
    return weights(folder), health(engine, [])


class Watch:
    """Counts preemptions of requests, and micro-batches that had to give blocks up."""

    def __init__(self, engine: CoServingEngine, monkeypatch: pytest.MonkeyPatch) -> None:
        from vllm_flexft.sched.run import FinetuneRun

        self.preemptions = self.releases = 0
        preempt, release = engine.scheduler._preempt_request, FinetuneRun.release_blocks

        def preempted(*args: Any, **kwargs: Any) -> None:
            self.preemptions += 1
            preempt(*args, **kwargs)

        def released(*args: Any, **kwargs: Any) -> bool:
            gave = release(*args, **kwargs)
            self.releases += gave
            return gave

        monkeypatch.setattr(engine.scheduler, "_preempt_request", preempted)
        monkeypatch.setattr(FinetuneRun, "release_blocks", released)


def in_training(engine: CoServingEngine) -> bool:
    return bool(engine.scheduler._lender.num_blocks)


LOADS = {
    # 4 requests of up to 3 blocks: exactly the cache
    "fits-exactly": [Ask(p, 60) for p in random_prompts(4, 1, (310, 320))],
    # as many again, later: vLLM queues them
    "queues": [Ask(p, 50) for p in random_prompts(8, 2, (300, 320))],
    # short prompts that grow: vLLM itself must preempt some
    "preempts-itself": [Ask(p, 300) for p in random_prompts(6, 3, (100, 120))],
}


@pytest.mark.parametrize("load", LOADS)
def test_requests_are_preempted_no_more_than_without_finetuning(
    load: str,
    engine: CoServingEngine,
    undisturbed: tuple[dict[str, torch.Tensor], Health],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected, idle = undisturbed
    alone = Watch(engine, monkeypatch)
    pump = Pump(engine)
    for ask in LOADS[load]:
        pump.ask(ask)
    pump.until(lambda: pump.answered)
    tokens = pump.in_order()
    assert (alone.preemptions > 0) == (load == "preempts-itself")
    monkeypatch.undo()

    beside = Watch(engine, monkeypatch)
    asked: list[int] = []

    def ask_when_blocks_are_lent(step: int, pump: Pump) -> None:
        if not asked and in_training(engine):
            asked.append(step)
            for ask in LOADS[load]:
                pump.ask(ask)

    record, pump = train(engine, job(tmp_path), ask_when_blocks_are_lent)
    assert record.status == "succeeded", record.error
    assert beside.releases > 0, "finetuning was never in the way"
    assert beside.preemptions == alone.preemptions
    assert pump.in_order() == tokens
    check_same(weights(tmp_path), expected)
    assert health(engine, []) == idle


def test_micro_batches_take_a_quarter_of_a_small_cache(
    engine: CoServingEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sequences of an optimizer step would fit a lane, but leave no block to requests."""
    plans = PlanLog.attach(engine, monkeypatch)
    record, _ = train(engine, job(tmp_path, train_batch_size=16, max_steps=2))
    assert record.status == "succeeded", record.error
    for batch in plans.micro_batches:
        lengths = [b - a for a, b in zip(batch.offsets, batch.offsets[1:], strict=False)]
        assert sum(-(-length // 128) for length in lengths) <= BLOCKS // 4 or len(lengths) == 1
    assert plans.updates[0] >= 2


Disturb = Callable[[CoServingEngine, Pump], None]


def pause_and_resume(engine: CoServingEngine, pump: Pump) -> None:
    engine.core.pause_scheduler("keep")
    assert not in_training(engine), "a paused engine holds no blocks"
    assert not engine.scheduler.has_requests()
    engine.core.resume_scheduler()


def reset_prefix_cache(engine: CoServingEngine, pump: Pump) -> None:
    assert engine.core.reset_prefix_cache()


def abort_a_request(engine: CoServingEngine, pump: Pump) -> None:
    running = [request.request_id for request in engine.scheduler.running]
    engine.core.abort_requests(running)


@pytest.mark.parametrize("disturb", [pause_and_resume, reset_prefix_cache, abort_a_request])
def test_disturbances_leave_the_result_as_it_is(
    disturb: Disturb,
    engine: CoServingEngine,
    undisturbed: tuple[dict[str, torch.Tensor], Health],
    tmp_path: Path,
) -> None:
    expected, idle = undisturbed
    name, pump = engine.submit(job(tmp_path)), Pump(engine)
    over = ended(engine, name)
    disturbed = 0

    def now_and_then(step: int) -> None:
        nonlocal disturbed
        if step % 3 == 0 and in_training(engine):
            if disturb is abort_a_request:
                pump.ask(Ask(random_prompts(1, step)[0], 200))
                pump.step()
            disturb(engine, pump)
            disturbed += 1

    pump.until(lambda: over() and not engine.scheduler.has_requests(), now_and_then)
    assert disturbed >= 3
    assert engine.store.get(name).status == "succeeded"
    check_same(weights(tmp_path), expected)
    assert health(engine, []) == idle


def test_cancelled_job_stops_within_seconds_and_can_be_submitted_again(
    engine: CoServingEngine,
    undisturbed: tuple[dict[str, torch.Tensor], Health],
    tmp_path: Path,
) -> None:
    expected, idle = undisturbed
    long = {**job(tmp_path, max_steps=5000), "name": "cancelled"}
    name, pump = engine.submit(long), Pump(engine)
    pump.until(lambda: in_training(engine))
    record = engine.store.request_cancel(engine.store.get(name).id)
    asked = time.monotonic()
    over = ended(engine, name)
    pump.until(lambda: over() and not engine.scheduler.has_requests())
    # A look at the store every half second, a step or two, the grace of API servers; on a busy
    # machine some of it several times as long. The job itself would take minutes.
    assert time.monotonic() - asked < 10.0
    assert engine.store.get(record.id).status == "cancelled"
    assert health(engine, []) == idle
    assert not (tmp_path / "out" / "adapter_config.json").exists()

    assert engine.store.request_cancel(record.id).status == "cancelled"
    engine.submit(long)
    pump.until(lambda: in_training(engine))
    again = time.monotonic()
    pump.until(lambda: time.monotonic() > again + 1.0)
    assert engine.store.get(record.id).status == "running", "the old request cancels the new run"
    engine.store.request_cancel(record.id)
    over = ended(engine, name)
    pump.until(lambda: over() and not engine.scheduler.has_requests())
    # Nothing of the cancelled job is left for the next one.
    other, _ = train(engine, job(tmp_path / "next"))
    assert other.status == "succeeded", other.error
    check_same(weights(tmp_path / "next"), expected)


def test_queued_jobs_run_one_after_another_in_their_order(
    engine: CoServingEngine,
    undisturbed: tuple[dict[str, torch.Tensor], Health],
    tmp_path: Path,
) -> None:
    expected, idle = undisturbed
    names = [engine.submit(job(tmp_path / f"{i}")) for i in range(3)]
    wait_for_jobs(engine.llm, timeout=240)
    records = [engine.store.get(name) for name in names]
    assert [record.status for record in records] == ["succeeded"] * 3
    ends = [record.finished_at for record in records]
    starts = [record.started_at for record in records]
    assert all(end <= start for end, start in zip(ends, starts[1:], strict=False))
    for i in range(3):
        check_same(weights(tmp_path / f"{i}"), expected)
    assert health(engine, []) == idle


def test_steady_requests_do_not_keep_a_job_from_starting(
    engine: CoServingEngine, tmp_path: Path
) -> None:
    """Before the first piece of finetune work its cost is unknown, and the engine never idle."""
    asked = 0

    def keep_one_running(step: int, pump: Pump) -> None:
        nonlocal asked
        if engine.scheduler.get_num_unfinished_requests() < 2:
            asked += 1
            pump.ask(Ask(random_prompts(1, step)[0], 60))

    pump = Pump(engine)
    keep_one_running(0, pump)
    name = engine.submit(job(tmp_path, max_steps=1))
    over = ended(engine, name)
    pump.until(over, lambda step: keep_one_running(step, pump))
    assert engine.store.get(name).status == "succeeded"
    assert asked > 1
    pump.until(lambda: pump.answered)
