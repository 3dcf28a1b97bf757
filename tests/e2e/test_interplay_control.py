"""What may happen to an engine while a job trains: pauses, aborts, resets, priorities, events.

One engine with the options on that change vLLM's scheduler or batches: priority policy, prompt
embeddings, KV-cache events, per-step statistics.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from harness.beside import (
    Said,
    Step,
    StepLog,
    Undisturbed,
    asked,
    asked_beside,
    assert_same_said,
    check_same,
    job,
    weights,
)
from harness.engine import CoServingEngine
from harness.health import health
from harness.traffic import Ask, Pump, ended, random_prompts
from vllm.config import KVEventsConfig


@pytest.fixture(scope="module")
def engine(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> CoServingEngine:
    return CoServingEngine(
        tiny_llama,
        tmp_path_factory.mktemp("state"),
        options={"tpot_ms": 1000},
        max_num_seqs=4,
        max_num_batched_tokens=256,
        num_gpu_blocks_override=25,  # 3072 tokens
        scheduling_policy="priority",
        enable_prompt_embeds=True,
        kv_events_config=KVEventsConfig(enable_kv_cache_events=True, publisher="null"),
        disable_log_stats=False,
        enable_mfu_metrics=True,
        enable_logging_iteration_details=True,
    )


@pytest.fixture(autouse=True)
def log(engine: CoServingEngine, monkeypatch: pytest.MonkeyPatch) -> StepLog:
    return StepLog.attach(engine, monkeypatch)


def test_urgent_requests_go_first_and_training_delays_none(
    engine: CoServingEngine, undisturbed: Undisturbed, tmp_path: Path, log: StepLog
) -> None:
    """More requests than places and blocks: with a job the same ones are taken in, and preempted,
    in the same order."""
    prompts = random_prompts(12, 1, (200, 300))
    asks = [Ask(p, 60, priority=-i % 5) for i, p in enumerate(prompts)]

    def order_of(steps: list[Step]) -> list[list[int]]:
        """Positions in `asks` of the requests in each step, where they change."""
        ids = {request for step in steps for request in step.request_tokens}
        number = {request: int(request.split("-")[1]) for request in ids}
        first = min(number.values())
        seen: list[list[int]] = []
        for step in steps:
            now = sorted(number[request] - first for request in step.request_tokens)
            if now and (not seen or seen[-1] != now):
                seen.append(now)
        return seen

    assert engine.core.reset_prefix_cache()
    alone = asked(engine, asks)
    taken_in = order_of(log.steps)
    assert engine.core.reset_prefix_cache()
    log.steps.clear()
    assert_same_said(asked_beside(engine, asks, job(tmp_path), log), alone)
    assert log.mixed
    assert order_of(log.steps) == taken_in
    check_same(weights(tmp_path), undisturbed[0])


def test_prompt_embeddings_beside_training(
    engine: CoServingEngine, undisturbed: Undisturbed, tmp_path: Path, log: StepLog
) -> None:
    width = engine.llm.model_config.get_hidden_size()
    generator = torch.Generator().manual_seed(1)
    asks = [
        Ask(torch.randn(length, width, generator=generator) * 0.02, 30) for length in (20, 300)
    ] + [Ask(random_prompts(1, 2)[0], 30)]
    alone = asked(engine, asks)
    assert_same_said(asked_beside(engine, asks, job(tmp_path), log), alone)
    assert len(log.mixed) >= 5
    check_same(weights(tmp_path), undisturbed[0])


def test_events_of_the_kv_cache_tell_of_requests_only(
    engine: CoServingEngine, tmp_path: Path, log: StepLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    published: list[Any] = []
    monkeypatch.setattr(
        engine.scheduler.kv_event_publisher,
        "publish",
        lambda batch: published.extend(batch.events),
    )
    asks = [Ask(p, 4) for p in random_prompts(3, 3, (256, 300))]

    def events() -> list[str]:
        told = [
            f"{type(event).__name__} {getattr(event, 'block_hashes', '')}" for event in published
        ]
        published.clear()
        return sorted(one for one in told if not one.startswith("AllBlocksCleared"))

    assert engine.core.reset_prefix_cache()
    engine.run(job(tmp_path / "1", max_steps=1))
    events()
    asked(engine, asks)
    alone = events()
    assert len(alone) >= 3
    assert engine.core.reset_prefix_cache()
    asked_beside(engine, asks, job(tmp_path / "2"), log)
    assert events() == alone


def test_training_leaves_the_prefix_cache_to_requests(
    engine: CoServingEngine, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    """Prompts computed before a job, which fill half of the cache, are found there during and
    after it: what training borrows goes round among blocks that hold nothing of requests."""
    prompts = random_prompts(4, 6, (400, 400))
    asks = [Ask(p, 8) for p in prompts]
    assert engine.core.reset_prefix_cache()
    pump = Pump(engine)

    def cached_tokens() -> list[int]:
        ids = [pump.ask(ask) for ask in asks]
        pump.until(lambda: pump.answered)
        return [pump.outputs[request_id].num_cached_tokens for request_id in ids]

    assert cached_tokens() == [0] * 4
    during: list[list[int]] = []
    name = engine.submit(job(tmp_path))
    over = ended(engine, name)

    def ask_again(step: int) -> None:
        if step % 10 == 0 and engine.scheduler._lender.num_blocks and len(during) < 3:
            during.append(cached_tokens())

    pump.until(lambda: over() and not engine.scheduler.has_requests(), ask_again)
    assert engine.store.get(name).status == "succeeded"
    assert during
    assert all(cached == [384] * 4 for cached in during)
    assert cached_tokens() == [384] * 4
    said = [pump.answers[request_id] for request_id in pump._order]
    assert all(said[i] == said[i % 4] for i in range(len(said)))
    check_same(weights(tmp_path), undisturbed[0])


Pause = Callable[[CoServingEngine], None]


def pause_keep(engine: CoServingEngine) -> None:
    engine.core.pause_scheduler("keep", clear_cache=False)


def pause_keep_clearing(engine: CoServingEngine) -> None:
    engine.core.pause_scheduler("keep", clear_cache=True)


def pause_abort(engine: CoServingEngine) -> None:
    engine.core.pause_scheduler("abort")


def sleep_at_level_0(engine: CoServingEngine) -> None:
    engine.llm.sleep(level=0, mode="keep")


@pytest.mark.parametrize("pause", [pause_keep, pause_keep_clearing, pause_abort, sleep_at_level_0])
def test_pause_stops_training_and_requests_alike_and_both_go_on_after_it(
    pause: Pause,
    engine: CoServingEngine,
    undisturbed: Undisturbed,
    tmp_path: Path,
    log: StepLog,
) -> None:
    expected, idle = undisturbed
    asks = [Ask(p, 40) for p in random_prompts(3, 4)]
    alone = asked(engine, asks)
    log.steps.clear()
    name, pump = engine.submit(job(tmp_path)), Pump(engine)
    over = ended(engine, name)
    pump.until(lambda: bool(engine.scheduler._lender.num_blocks))
    ids = [pump.ask(ask) for ask in asks]
    pump.until(lambda: len(log.mixed) >= 3)

    pause(engine)
    assert not engine.scheduler._lender.num_blocks, "a paused engine lends no blocks"
    log.steps.clear()
    late = pump.ask(asks[0])
    deadline = time.monotonic() + 0.5
    while time.monotonic() < deadline:
        if engine.scheduler.has_requests():
            pump.step()
        time.sleep(0.01)
    assert not any(step.finetuning or step.request_tokens for step in log.steps)
    assert not engine.scheduler.has_requests(), "the pause would never be complete"
    assert engine.store.get(name).status == "running"

    engine.llm.wake_up(tags=["scheduling"]) if "sleep" in pause.__name__ else (
        engine.core.resume_scheduler()
    )
    kept = [late] if pause is pause_abort else [*ids, late]
    pump.until(
        lambda: over() and set(kept) <= set(pump.outputs) and not engine.scheduler.has_requests()
    )
    got = {request_id: Said.of(pump.outputs[request_id]) for request_id in kept}
    assert_same_said([got[late]], [alone[0]])
    if pause is not pause_abort:
        assert_same_said([got[request_id] for request_id in ids], alone)
    assert engine.store.get(name).status == "succeeded"
    check_same(weights(tmp_path), expected)
    engine.llm.llm_engine.abort_request(ids)
    assert health(engine, []) == idle


def test_reset_of_the_cache_under_running_requests_changes_no_answer(
    engine: CoServingEngine, undisturbed: Undisturbed, tmp_path: Path, log: StepLog
) -> None:
    expected, idle = undisturbed
    asks = [Ask(p, 40) for p in random_prompts(6, 5)]
    alone = asked(engine, asks)
    resets = 0

    def reset_now_and_then(step: int) -> None:
        nonlocal resets
        if step % 7 == 0 and engine.scheduler.running and engine.scheduler._lender.num_blocks:
            assert engine.core.reset_prefix_cache(reset_running_requests=True)
            resets += 1

    log.steps.clear()
    got = asked_beside(engine, asks, job(tmp_path), log, reset_now_and_then)
    assert resets >= 2
    assert_same_said(got, alone)
    check_same(weights(tmp_path), expected)
    assert health(engine, []) == idle


def test_aborted_requests_go_at_once_and_the_others_are_answered(
    engine: CoServingEngine, undisturbed: Undisturbed, tmp_path: Path, log: StepLog
) -> None:
    """Waiting, in the middle of its prompt, decoding, and one that samples thrice."""
    expected, idle = undisturbed
    stay = [Ask(p, 40) for p in random_prompts(2, 6)]
    alone = asked(engine, stay)
    log.steps.clear()
    name, pump = engine.submit(job(tmp_path)), Pump(engine)
    over = ended(engine, name)
    pump.until(lambda: bool(engine.scheduler._lender.num_blocks))
    kept = [pump.ask(ask) for ask in stay]
    going: Iterator[Any] = iter(random_prompts(4, 7, (400, 440)))
    aborted = [
        pump.ask(Ask(next(going), 60)),
        pump.ask(Ask(next(going), 20, sampling={"n": 3, "temperature": 1.0})),
    ]
    llm_engine = engine.llm.llm_engine
    for request_id in aborted:
        pump.step()
        llm_engine.abort_request([request_id])
    waiting = [pump.ask(Ask(next(going), 20, priority=9)) for _ in range(2)]
    llm_engine.abort_request(waiting)
    pump.until(
        lambda: over() and set(kept) <= set(pump.outputs) and not engine.scheduler.has_requests()
    )
    assert len(log.mixed) >= 5
    assert_same_said([Said.of(pump.outputs[request_id]) for request_id in kept], alone)
    assert engine.store.get(name).status == "succeeded"
    check_same(weights(tmp_path), expected)
    assert health(engine, []) == idle
