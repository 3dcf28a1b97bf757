"""An exception at every call of every stage of a job: the job fails, the engine never does."""

from __future__ import annotations

import pkgutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from harness.engine import CoServingEngine
from harness.health import Health, health
from harness.peft_reference import PeftTrainer, write_rows
from harness.rooms import work_a_step
from harness.traffic import Ask, Pump, lora_request, random_prompts, train
from safetensors.torch import load_file

ROWS = [(f"Say {i}. " * (1 + 3 * (i % 4)), f" It is {i}.") for i in range(6)]

# Every function that a step of a job goes through, scheduler and worker, by stage.
FATAL = {
    "open": [
        "vllm_flexft.runner.opened_job:open_slot",
        "vllm_flexft.runner.opened_job:Trainer._plan_memory",
        "vllm_flexft.runner.opened_job:Capture.__init__",
        "vllm_flexft.train.trainer:targets_of",
        "vllm_flexft.train.adapter:TrainableAdapter.__init__",
        "vllm_flexft.train.adapter:TrainableAdapter.initialise",
        "vllm_flexft.train.optimizer:AdapterOptimizer.__init__",
        "vllm_flexft.train.activations:ActivationStore.__init__",
        "vllm_flexft.train.working:WorkingBuffers.__init__",
        "vllm_flexft.train.layer:LayerBackward.of",
    ],
    "plan": [
        "vllm_flexft.sched.run:FinetuneRun.__init__",
        "vllm_flexft.sched.run:FinetuneRun.draw",
        "vllm_flexft.sched.run:FinetuneRun.commit",
        "vllm_flexft.sched.run:FinetuneRun.take_back",
        "vllm_flexft.sched.run:FinetuneRun._begin_next",
        "vllm_flexft.sched.run:FinetuneRun._close_phase",
        "vllm_flexft.sched.run:FinetuneRun.on_result",
        "vllm_flexft.sched.sequence_kv:KVLender.extend",
        "vllm_flexft.sched.sequence_kv:KVLender._allocate",
        "vllm_flexft.sched.draft:Drafts.of_step",
        "vllm_flexft.sched.draft:Drafts.draw_ahead",
        "vllm_flexft.sched.draft:Drafts._draw_run",
        "vllm_flexft.sched.pacer:Pacer.room",
        "vllm_flexft.sched.pacer:Pacer.room_ahead",
        "vllm_flexft.sched.pacer:Pacer.holds",
        "vllm_flexft.sched.pacer:Pacer.planned",
        "vllm_flexft.sched.pacer:Pacer.finished",
        "vllm_flexft.sched.pacer:Pacer.learn",
        "vllm_flexft.sched.run:FinetuneRun.prepare",
        "vllm_flexft.sched.sequence_kv:KVLender.borrow",
    ],
    "begin": ["vllm_flexft.train.backward:MicroBatchBackward.__init__"],
    "forward": [
        "vllm_flexft.runner.hook:CoServeRunnerMixin._finetune_rows",
        "vllm_flexft.runner.hook:diverged",
        "vllm_flexft.train.activations:ActivationStore.write",
    ],
    "slice": [
        "vllm_flexft.train.backward:MicroBatchBackward.locate_kv",
        "vllm_flexft.train.backward:MicroBatchBackward._load_kv",
        "vllm_flexft.train.backward:MicroBatchBackward._loss",
        "vllm_flexft.train.layer:LayerBackward.window",
    ],
    "update": [
        "vllm_flexft.train.optimizer:AdapterOptimizer.update",
        "vllm_flexft.train.adapter:TrainableAdapter.push",
        "vllm_flexft.train.trainer:Trainer._update",
    ],
    "save": [
        "vllm_flexft.train.trainer:Trainer._save",
        "vllm_flexft.train.adapter:TrainableAdapter.state",
        "vllm_flexft.train.trainer:Trainer._written",
        "vllm_flexft.publish.writer:publish_final",
    ],
}
# These do not decide over the job: it ends as it would have.
HARMLESS = {
    "checkpoint": ["vllm_flexft.publish.writer:write_checkpoint"],
    "report": ["vllm_flexft.sched.reporter:Reporter.log"],
    "close": [
        "vllm_flexft.runner.capture:Capture.remove",
        "vllm_flexft.train.trainer:Trainer.close",
    ],
}


class InjectedError(Exception):
    pass


@contextmanager
def faulty(point: str, at: int | None) -> Iterator[list[int]]:
    """Raise at call number `at` of a function, counted from 1; yields the list of calls made."""
    owner_path, name = point.rsplit(".", 1) if "." in point.split(":")[1] else point.split(":")
    owner = pkgutil.resolve_name(owner_path)
    original = vars(owner)[name]
    function = original.__func__ if isinstance(original, classmethod) else original
    calls: list[int] = []

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        calls.append(len(calls) + 1)
        if calls[-1] == at:
            raise InjectedError(f"injected into {name}")
        return function(*args, **kwargs)

    setattr(owner, name, classmethod(wrapper) if isinstance(original, classmethod) else wrapper)
    try:
        yield calls
    finally:
        setattr(owner, name, original)


@pytest.fixture(autouse=True)
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several steps of the engine per optimizer step, the same in every run."""
    work_a_step(monkeypatch, lambda: 600.0)


@pytest.fixture(scope="module")
def asks(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Ask]:
    reference = PeftTrainer(tiny_llama, {"r": 8, "target_modules": ["q_proj", "down_proj"]})
    reference.randomise(1)
    lora = lora_request("served", 1, reference.save(tmp_path_factory.mktemp("served")))
    first, second = random_prompts(2, 1, (20, 60))
    return [Ask(first, 6), Ask(second, 6, lora)]


def job(folder: Path) -> dict[str, Any]:
    """Two optimizer steps, each followed by an evaluation and a checkpoint."""
    rows = write_rows(folder / "rows.jsonl", ROWS)
    return {
        "dataset": {"path": str(rows), "shuffle": False},
        "validation": {"path": str(rows), "every_steps": 1},
        "training": {
            "max_steps": 2, "train_batch_size": 3, "learning_rate": 1e-2, "save_steps": 1,
        },
        "output_dir": str(folder / "out"),
    }  # fmt: skip


def check_adapter(folder: Path, expected: dict[str, torch.Tensor]) -> None:
    got = load_file(folder / "adapter_model.safetensors")
    for name, tensor in expected.items():
        torch.testing.assert_close(got[name], tensor, rtol=1e-4, atol=1e-6)


@pytest.fixture(scope="module")
def undisturbed(
    engine: CoServingEngine, asks: list[Ask], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Health, dict[str, torch.Tensor]]:
    folder = tmp_path_factory.mktemp("undisturbed")
    record, _ = train(engine, job(folder))
    assert record.status == "succeeded", record.error
    return health(engine, asks), load_file(folder / "out" / "adapter_model.safetensors")


def points(groups: dict[str, list[str]]) -> list[Any]:
    return [
        pytest.param(point, id=f"{stage}-{point.split(':')[1]}")
        for stage, members in groups.items()
        for point in members
    ]


def calls_of(point: str, engine: CoServingEngine, folder: Path, meanwhile: Any) -> int:
    folder.mkdir()
    with faulty(point, at=None) as calls:
        train(engine, job(folder), meanwhile)
    return len(calls)


@pytest.mark.parametrize("point", points(FATAL))
def test_exception_at_any_call_fails_the_job_and_nothing_else(
    point: str,
    engine: CoServingEngine,
    asks: list[Ask],
    undisturbed: tuple[Health, dict[str, torch.Tensor]],
    tmp_path: Path,
) -> None:
    healthy, expected = undisturbed

    def ask_meanwhile(step: int, pump: Pump) -> None:
        if engine.scheduler._runs and len(pump._order) < 3:
            pump.ask(asks[step % 2])

    count = calls_of(point, engine, tmp_path / "count", ask_meanwhile)
    assert count > 0, "never called"
    failed = 0
    # Every call; of those that are made dozens of times, every n-th.
    for at in range(1, count + 1, max(1, count // 16)):
        folder = tmp_path / str(at)
        folder.mkdir()
        with faulty(point, at):
            record, _ = train(engine, job(folder), ask_meanwhile if at % 2 else lambda *_: None)
        if record.status == "succeeded":  # a call that this run did not make
            assert at > 1 or "Pacer" in point  # which is called without a job too
            continue
        failed += 1
        assert "injected into" in record.error
        if (folder / "out" / "adapter_config.json").exists():  # all but the good news was done
            check_adapter(folder / "out", expected)
    assert failed
    assert health(engine, asks) == healthy
    good = tmp_path / "good"
    good.mkdir()
    record, _ = train(engine, job(good))
    assert record.status == "succeeded", record.error
    check_adapter(good / "out", expected)


@pytest.mark.parametrize("point", points(HARMLESS))
def test_exception_in_what_only_accompanies_a_job_leaves_its_result(
    point: str,
    engine: CoServingEngine,
    asks: list[Ask],
    undisturbed: tuple[Health, dict[str, torch.Tensor]],
    tmp_path: Path,
) -> None:
    healthy, expected = undisturbed
    with faulty(point, at=1) as calls:
        record, _ = train(engine, job(tmp_path))
        after = health(engine, asks)
    assert calls
    assert record.status == "succeeded", record.error
    check_adapter(tmp_path / "out", expected)
    assert after.answers == healthy.answers
    assert after.free_blocks == healthy.free_blocks
    assert after.training_adapters == ()


def test_learning_that_keeps_failing_fails_jobs_and_answers_go_on(
    engine: CoServingEngine,
    asks: list[Ask],
    undisturbed: tuple[Health, dict[str, torch.Tensor]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(*_: Any) -> None:
        raise InjectedError("injected into observe")

    monkeypatch.setattr("vllm_flexft.sched.latency.LatencyModel.observe", broken)
    record, _ = train(engine, job(tmp_path))
    assert record.status == "failed"
    assert "injected into observe" in (record.error or "")
    assert health(engine, asks) == undisturbed[0]
