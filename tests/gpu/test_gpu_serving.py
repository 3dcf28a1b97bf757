"""What finetuning must leave to requests on a GPU: their tokens, and decode's CUDA graphs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from harness.engine import CoServingEngine
from harness.peft_reference import PeftTrainer, write_rows
from harness.rooms import work_a_step
from harness.traffic import Ask, PlanLog, Pump, answers, ended, lora_request, random_prompts

from vllm_flexft.plan import PLAN_ATTRIBUTE

PEFT = {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj", "gate_proj", "down_proj"]}


@pytest.fixture
def engine(make, tmp_path, engine_options, monkeypatch) -> CoServingEngine:
    work_a_step(monkeypatch, lambda: 200.0)
    return CoServingEngine(
        make("bfloat16"), tmp_path / "state", dtype="bfloat16", max_loras=2, **engine_options
    )


def job(folder: Path) -> dict[str, Any]:
    rows = [(f"Question {i}: " + "how many owls? " * (i % 5), f" {i} owls.") for i in range(24)]
    return {
        "dataset": {"path": str(write_rows(folder / "rows.jsonl", rows))},
        "peft": PEFT,
        "training": {"train_batch_size": 8, "learning_rate": 2e-2, "max_steps": 10_000},
        "output_dir": str(folder / "out"),
    }


class Beside:
    """A job that trains, until the block is left."""

    def __init__(self, engine: CoServingEngine, folder: Path) -> None:
        self.engine, self.folder, self.pump = engine, folder, Pump(engine)

    def __enter__(self) -> Pump:
        self.name = self.engine.submit(job(self.folder))
        self.pump.until(lambda: any(run._opened for run in self.engine.scheduler._runs))
        return self.pump

    def __exit__(self, *_: Any) -> None:
        store = self.engine.store
        error = store.get(self.name).error
        store.request_cancel(store.get(self.name).id)
        self.pump.until(ended(self.engine, self.name))
        assert error is None


def test_requests_get_the_same_tokens_beside_a_job(engine, tmp_path, on_gpu, monkeypatch):
    if on_gpu and os.environ.get("VLLM_BATCH_INVARIANT") != "1":
        pytest.skip("VLLM_BATCH_INVARIANT=1 has to be set from the start")
    reference = PeftTrainer(engine.model, PEFT)
    reference.randomise(1, scale=0.1)
    served = lora_request("served", 1, reference.save(tmp_path / "served"))
    asks = [
        Ask(prompt, 32, served if i % 2 else None)
        for i, prompt in enumerate(random_prompts(12, 2, (3, 150)))
    ]
    alone = answers(engine, asks)
    engine.llm.reset_prefix_cache()
    plans = PlanLog.attach(engine, monkeypatch)
    with Beside(engine, tmp_path) as pump:
        for ask in asks:
            pump.ask(ask)
        pump.until(lambda: pump.answered)
    assert plans.mixed_steps >= 5, "requests and training hardly shared a step"
    assert pump.in_order() == alone


def test_every_decode_only_step_replays_a_full_graph(engine, tmp_path, on_gpu, monkeypatch):
    if not on_gpu:
        pytest.skip("there are no CUDA graphs on CPU")
    runner = engine.core.model_executor.driver_worker.worker.model_runner
    manager, execute = runner.cudagraph_manager, runner.execute_model
    replay, replays = manager.run_fullgraph, []
    steps: list[tuple[bool, bool]] = []  # decode only: with slices in it, and replayed

    def replayed(desc: Any) -> Any:
        replays.append(desc)
        return replay(desc)

    def executed(scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        before, plans = len(replays), getattr(scheduler_output, PLAN_ATTRIBUTE, ())
        output = execute(scheduler_output, *args, **kwargs)
        tokens = set(scheduler_output.num_scheduled_tokens.values())
        if tokens == {1} and not scheduler_output.scheduled_new_reqs:
            if not any(plan.chunks for plan in plans):
                steps.append((any(plan.backward for plan in plans), len(replays) > before))
        return output

    monkeypatch.setattr(manager, "run_fullgraph", replayed)
    monkeypatch.setattr(runner, "execute_model", executed)
    with Beside(engine, tmp_path) as pump:
        for prompt in random_prompts(6, 3, (3, 60)):
            pump.ask(Ask(prompt, 48))
        pump.until(lambda: pump.answered)
    assert (True, True) in steps, "no step had slices and no chunks"
    assert [step for step in steps if not step[1]] == []
