"""Async scheduling: several steps under way before the first one's tokens are known.

vLLM turns it off on CPU, where it gains nothing. Here it is on: its own AsyncScheduler, batch
queue and runner do all that they do on a GPU but overlap, since CUDA's streams and events, which
order that overlap, are replaced by empty ones.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from harness.beside import (
    Said,
    StepLog,
    asked,
    asked_beside,
    assert_same_said,
    check_same,
    job,
    weights,
)
from harness.engine import CoServingEngine
from harness.health import Health, health
from harness.traffic import Ask, Pump, ended, random_prompts, train
from vllm.sampling_params import StructuredOutputsParams

ENGINE = {
    "options": {"tpot_ms": 1000},
    "max_num_seqs": 6,
    "max_num_batched_tokens": 256,
}


class Nothing:
    """A CUDA stream or event on a machine where all is in order anyway."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.record = self.synchronize = self.wait = self.wait_stream = lambda *args: None


@pytest.fixture(scope="module")
def engine(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[CoServingEngine]:
    from vllm.platforms.cpu import CpuPlatform

    check = CpuPlatform.check_and_update_config.__func__

    def check_and_keep_async(cls: Any, vllm_config: Any) -> None:
        check(cls, vllm_config)
        vllm_config.scheduler_config.async_scheduling = True

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "Event", Nothing)
        patch.setattr(torch.cuda, "Stream", Nothing)
        patch.setattr(torch.cuda, "current_stream", Nothing)
        patch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
        with pytest.MonkeyPatch.context() as start:
            keep = classmethod(check_and_keep_async)
            start.setattr(CpuPlatform, "check_and_update_config", keep)
            engine = CoServingEngine(tiny_llama, tmp_path_factory.mktemp("state"), **ENGINE)
        yield engine


@pytest.fixture(scope="module")
def expected(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """The adapter that an engine without async scheduling trains."""
    folder = tmp_path_factory.mktemp("sync")
    engine = CoServingEngine(tiny_llama, folder / "state", **ENGINE)
    assert engine.core.batch_queue is None
    record, _ = train(engine, job(folder))
    assert record.status == "succeeded", record.error
    return weights(folder)


@pytest.fixture(scope="module")
def idle(engine: CoServingEngine) -> Health:
    return health(engine, [])


@pytest.fixture(params=[2, 4])
def depth(
    request: pytest.FixtureRequest, engine: CoServingEngine, monkeypatch: pytest.MonkeyPatch
) -> int:
    """Steps under way at once: vLLM's own two, and more, as with pipeline stages."""
    assert type(engine.scheduler).__name__ == "CoServeAsyncScheduler"
    assert engine.core.batch_queue_size == 2
    monkeypatch.setattr(engine.core, "batch_queue_size", request.param)
    monkeypatch.setattr(engine.core, "batch_queue", deque(maxlen=request.param))
    return int(request.param)


ASKS = [
    *(Ask(p, 30) for p in random_prompts(5, 1)),
    *(Ask(p, 12) for p in random_prompts(2, 2, (380, 440))),
    Ask(random_prompts(1, 3)[0], 24, sampling={"temperature": 1.0, "seed": 7, "n": 2}),
]


def asks(depth: int) -> list[Ask]:
    """vLLM's own queue of two waits for a token before it constrains the next one, a longer queue
    does not: structured output is asked for in the former only."""
    params = StructuredOutputsParams(regex=r"[a-c]{3}-[0-9]{4}")
    constraint = {"structured_outputs": params, "ignore_eos": False}
    return ASKS + [Ask(random_prompts(1, 4)[0], 40, sampling=constraint)] * (depth == 2)


def test_requests_and_job_get_what_they_get_without_it(
    depth: int,
    engine: CoServingEngine,
    expected: dict[str, torch.Tensor],
    idle: Health,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    alone = asked(engine, asks(depth))
    log = StepLog.attach(engine, monkeypatch)
    assert_same_said(asked_beside(engine, asks(depth), job(tmp_path), log), alone)
    assert len(log.mixed) >= 5, "requests and training hardly shared a step"
    assert max(step.in_flight for step in log.mixed) == depth - 1
    check_same(weights(tmp_path), expected)
    assert health(engine, []) == idle


def test_job_without_requests_keeps_steps_under_way(
    depth: int,
    engine: CoServingEngine,
    expected: dict[str, torch.Tensor],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    log = StepLog.attach(engine, monkeypatch)
    engine.run(job(tmp_path))
    ahead = [step for step in log.steps if step.finetuning and step.in_flight == depth - 1]
    assert len(ahead) >= 0.5 * sum(step.finetuning for step in log.steps)
    check_same(weights(tmp_path), expected)


def test_pause_and_abort_with_steps_under_way_leave_the_result_as_it_is(
    depth: int,
    engine: CoServingEngine,
    expected: dict[str, torch.Tensor],
    idle: Health,
    tmp_path: Path,
) -> None:
    """Blocks come back while the steps that write to them are still under way."""
    name, pump = engine.submit(job(tmp_path)), Pump(engine)
    over = ended(engine, name)
    disturbed = 0

    def disturb(step: int) -> None:
        nonlocal disturbed
        if step % 5 == 0 and engine.scheduler._lender.num_blocks and engine.core.batch_queue:
            disturbed += 1
            if disturbed % 2:
                engine.core.pause_scheduler("keep")
                assert not engine.scheduler._lender.num_blocks
                engine.core.resume_scheduler()
            else:
                pump.ask(Ask(random_prompts(1, step)[0], 200))
                pump.step()
                running = [request.request_id for request in engine.scheduler.running]
                engine.core.abort_requests(running)

    pump.until(lambda: over() and not engine.scheduler.has_requests(), disturb)
    assert disturbed >= 3
    assert engine.store.get(name).status == "succeeded"
    check_same(weights(tmp_path), expected)
    assert health(engine, []) == idle


def test_job_that_fails_with_steps_under_way_harms_neither_requests_nor_the_next_job(
    depth: int,
    engine: CoServingEngine,
    expected: dict[str, torch.Tensor],
    idle: Health,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from vllm_flexft.train.optimizer import AdapterOptimizer

    alone = asked(engine, ASKS)
    update, updates = AdapterOptimizer.update, []

    def fail_at_third(self: Any, *args: Any) -> torch.Tensor:
        updates.append(1)
        if len(updates) == 3:
            raise RuntimeError("no third step")
        return update(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(AdapterOptimizer, "update", fail_at_third)
        name, pump = engine.submit(job(tmp_path)), Pump(engine)
        pump.until(lambda: bool(updates))
        ids = [pump.ask(ask) for ask in ASKS]
        over = ended(engine, name)
        pump.until(lambda: over() and pump.answered and not engine.scheduler.has_requests())
    record = engine.store.get(name)
    assert record.status == "failed"
    assert "no third step" in record.error
    assert len(updates) == 3, "plans that were under way trained on"
    assert_same_said([Said.of(pump.outputs[request_id]) for request_id in ids], alone)
    engine.run(job(tmp_path / "next"))
    check_same(weights(tmp_path / "next"), expected)
    assert health(engine, []) == idle
