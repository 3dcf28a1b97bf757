"""Inference requests on an in-process engine, while jobs train on it or not."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from harness.engine import CoServingEngine

_ids = itertools.count()


@dataclass(frozen=True)
class Ask:
    """A request, greedy unless `sampling` says otherwise, for the base model or an adapter."""

    prompt: Any  # token ids; or embeddings, shape (tokens, D)
    max_tokens: int = 16
    lora: Any = None  # a vllm LoRARequest
    sampling: Mapping[str, Any] = field(default_factory=dict)  # further SamplingParams
    priority: int = 0


def lora_request(name: str, number: int, folder: Path) -> Any:
    from vllm.lora.request import LoRARequest

    return LoRARequest(lora_name=name, lora_int_id=number, lora_path=str(folder))


def random_prompts(count: int, seed: int, lengths: tuple[int, int] = (4, 60)) -> list[tuple]:
    draw = random.Random(seed)
    return [
        tuple(draw.randrange(10, 900) for _ in range(draw.randint(*lengths))) for _ in range(count)
    ]


class Pump:
    """Makes the engine's steps one by one and keeps what its requests answer.

    `on_step(n)` runs before step n; steps are counted from 0.
    """

    def __init__(self, engine: CoServingEngine) -> None:
        self.engine = engine
        self.answers: dict[str, list[int]] = {}  # request id -> tokens
        self.outputs: dict[str, Any] = {}  # request id -> vllm RequestOutput, when it is finished
        self.steps = 0
        self._order: list[str] = []

    def ask(self, ask: Ask) -> str:
        from vllm import SamplingParams

        request_id = f"ask-{next(_ids)}"
        self._order.append(request_id)
        ids = isinstance(ask.prompt, tuple)
        options = {"temperature": 0.0, "max_tokens": ask.max_tokens, "ignore_eos": True}
        self.engine.llm.llm_engine.add_request(
            request_id,
            {"prompt_token_ids": list(ask.prompt)} if ids else {"prompt_embeds": ask.prompt},
            SamplingParams(**{**options, **ask.sampling}),
            lora_request=ask.lora,
            priority=ask.priority,
        )
        return request_id

    def step(self) -> None:
        for output in self.engine.llm.llm_engine.step():
            if output.finished:
                self.answers[output.request_id] = list(output.outputs[0].token_ids)
                self.outputs[output.request_id] = output
        self.steps += 1

    @property
    def answered(self) -> bool:
        return len(self.answers) == len(self._order)

    def in_order(self) -> list[list[int]]:
        """The answers, in the order in which they were asked for."""
        assert self.answered, f"{len(self.answers)} of {len(self._order)} requests are answered"
        return [self.answers[request_id] for request_id in self._order]

    def until(
        self,
        done: Callable[[], bool],
        on_step: Callable[[int], None] = lambda step: None,
        timeout: float = 240.0,
    ) -> None:
        deadline = time.monotonic() + timeout
        while not done():
            assert time.monotonic() < deadline, f"not done after {timeout} s, {self.steps} steps"
            on_step(self.steps)
            if self.engine.scheduler.has_requests():
                self.step()
            else:
                time.sleep(0.002)


def answers(
    engine: CoServingEngine, asks: Sequence[Ask], timeout: float = 240.0
) -> list[list[int]]:
    """Greedy tokens of concurrent requests; whatever else the engine does goes on meanwhile."""
    pump = Pump(engine)
    for ask in asks:
        pump.ask(ask)
    pump.until(lambda: pump.answered, timeout=timeout)
    return pump.in_order()


def ended(engine: CoServingEngine, name: str) -> Callable[[], bool]:
    """Whether the job is over, looked up in the store every few milliseconds at most."""
    looked = [0.0, False]

    def check() -> bool:
        if time.monotonic() - looked[0] > 0.005:
            looked[1] = engine.store.get(name).status in ("succeeded", "failed", "cancelled")
            looked[0] = time.monotonic()
        return bool(looked[1])

    return check


def train(
    engine: CoServingEngine,
    job: Mapping[str, Any],
    on_step: Callable[[int, Pump], None] = lambda step, pump: None,
    timeout: float = 240.0,
) -> tuple[Any, Pump]:
    """Run a job to its end, good or bad, with `on_step` free to ask; its record and the pump."""
    name, pump = engine.submit(job), Pump(engine)
    over = ended(engine, name)
    pump.until(
        lambda: over() and pump.answered and not engine.scheduler.has_requests(),
        lambda step: on_step(step, pump),
        timeout,
    )
    return engine.store.get(name), pump


class PlanLog:
    """What the scheduler planned: attach with `PlanLog.attach`, before a job is trained."""

    def __init__(self) -> None:
        self.micro_batches: list[Any] = []  # vllm_flexft.plan.MicroBatch, in their order
        self.updates: list[int] = []  # micro-batches begun before each optimizer step
        self.mixed_steps = 0  # steps with both finetune chunks and inference tokens
        self.chunks = 0

    @classmethod
    def attach(cls, engine: CoServingEngine, monkeypatch: pytest.MonkeyPatch) -> PlanLog:
        log, schedule = cls(), engine.scheduler.schedule

        def logged(*args: Any, **kwargs: Any) -> Any:
            output = schedule(*args, **kwargs)
            for plan in getattr(output, "flexft_plan", ()):
                log.micro_batches.extend(batch for batch in plan.begin if batch.train)
                log.chunks += len(plan.chunks)
                finetune = sum(chunk.num_tokens for chunk in plan.chunks)
                log.mixed_steps += 0 < finetune < output.total_num_scheduled_tokens
                if plan.optimizer_step is not None:
                    log.updates.append(len(log.micro_batches))
            return output

        monkeypatch.setattr(engine.scheduler, "schedule", logged)
        return log

    def step_sequences(self) -> list[list[list[int]]]:
        """Token ids of the sequences of every optimizer step, as they went into the batches."""
        steps, first = [], 0
        for last in self.updates:
            steps.append(
                [
                    batch.token_ids[start:stop].tolist()
                    for batch in self.micro_batches[first:last]
                    for start, stop in itertools.pairwise(batch.offsets)
                ]
            )
            first = last
        return steps
