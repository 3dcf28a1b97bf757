"""Requests beside a job in training: what both must give, and what the steps held."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from harness.engine import CoServingEngine
from harness.health import Health
from harness.peft_reference import write_rows
from harness.traffic import Ask, Pump, ended

Undisturbed = tuple[dict[str, torch.Tensor], Health]  # adapter, and the engine after it
ROWS = [(f"Say {i}. " * (10 + 12 * (i % 4)), f" It is {i}.") for i in range(16)]


def job(folder: Path, **training: Any) -> dict[str, Any]:
    """8 optimizer steps of 8 sequences of 60 to 250 tokens."""
    folder.mkdir(parents=True, exist_ok=True)
    defaults = {"max_steps": 8, "train_batch_size": 8, "learning_rate": 2e-3}
    return {
        "dataset": {"path": str(write_rows(folder / "rows.jsonl", ROWS))},
        "training": {**defaults, **training},
        "output_dir": str(folder / "out"),
    }


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "out" / "adapter_model.safetensors")


def check_same(ours: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == expected.keys()
    for name, tensor in expected.items():
        difference = (ours[name] - tensor).norm() / tensor.norm()
        assert difference < 1e-3, f"{name}: {difference:.1e}"


@dataclass(frozen=True)
class Step:
    """What the scheduler put into one step."""

    request_tokens: dict[str, int]  # by request id
    chunk_tokens: int
    slices: int
    in_flight: int  # steps that had been scheduled and not yet taken back

    @property
    def finetuning(self) -> bool:
        return self.chunk_tokens > 0 or self.slices > 0

    @property
    def mixed(self) -> bool:
        return self.finetuning and bool(self.request_tokens)


@dataclass
class StepLog:
    steps: list[Step] = field(default_factory=list)
    _in_flight: int = 0

    @classmethod
    def attach(cls, engine: CoServingEngine, monkeypatch: pytest.MonkeyPatch) -> StepLog:
        scheduler = engine.scheduler
        log = cls(_in_flight=len(engine.core.batch_queue or ()))
        schedule, update = scheduler.schedule, scheduler.update_from_output

        def scheduled(*args: Any, **kwargs: Any) -> Any:
            output = schedule(*args, **kwargs)
            plans = getattr(output, "flexft_plan", ())
            chunks = {chunk.req_id: chunk.num_tokens for plan in plans for chunk in plan.chunks}
            requests = output.num_scheduled_tokens.items()
            log.steps.append(
                Step(
                    {request: tokens for request, tokens in requests if request not in chunks},
                    sum(chunks.values()),
                    sum(work.count for plan in plans for work in plan.backward),
                    log._in_flight,
                )
            )
            log._in_flight += 1
            return output

        def updated(*args: Any, **kwargs: Any) -> Any:
            log._in_flight -= 1
            return update(*args, **kwargs)

        monkeypatch.setattr(scheduler, "schedule", scheduled)
        monkeypatch.setattr(scheduler, "update_from_output", updated)
        return log

    @property
    def mixed(self) -> list[Step]:
        return [step for step in self.steps if step.mixed]


@dataclass(frozen=True)
class Said:
    """What a finished request got: its texts and tokens, and log probabilities where asked for."""

    texts: list[Any]
    logprobs: list[dict[int, float]]

    @classmethod
    def of(cls, output: Any) -> Said:
        outputs = sorted(output.outputs, key=lambda one: one.index)
        positions = [*(output.prompt_logprobs or ())]
        for one in outputs:
            positions.extend(one.logprobs or ())
        return cls(
            [(one.index, list(one.token_ids), one.text, one.finish_reason) for one in outputs],
            [{token: value.logprob for token, value in (at or {}).items()} for at in positions],
        )


def assert_same_said(ours: Sequence[Said], expected: Sequence[Said]) -> None:
    for one, other in zip(ours, expected, strict=True):
        assert one.texts == other.texts
        for at, wanted in zip(one.logprobs, other.logprobs, strict=True):
            assert at == pytest.approx(wanted, abs=1e-4)


def asked(engine: CoServingEngine, asks: Sequence[Ask]) -> list[Said]:
    """What concurrent requests get while nothing trains."""
    pump = Pump(engine)
    ids = [pump.ask(ask) for ask in asks]
    pump.until(lambda: pump.answered)
    return [Said.of(pump.outputs[request_id]) for request_id in ids]


def asked_beside(
    engine: CoServingEngine,
    asks: Sequence[Ask],
    wanted: dict[str, Any],
    log: StepLog,
    on_step: Callable[[int], None] = lambda step: None,
) -> list[Said]:
    """The same while `wanted` trains, asked when its first chunk has run; the job must succeed."""
    name, pump = engine.submit(wanted), Pump(engine)
    over = ended(engine, name)
    pump.until(lambda: over() or any(step.chunk_tokens for step in log.steps))
    ids = [pump.ask(ask) for ask in asks]
    pump.until(
        lambda: over() and pump.answered and not engine.scheduler.has_requests(), on_step, 120.0
    )
    record = engine.store.get(name)
    assert record.status == "succeeded", record.error
    return [Said.of(pump.outputs[request_id]) for request_id in ids]
