"""Several adapters train at once in one engine, each as if alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from harness.engine import CoServingEngine
from harness.health import health
from harness.peft_reference import write_rows
from harness.rooms import work_a_step
from harness.run_state import metrics
from harness.traffic import Ask, Pump, ended, random_prompts
from safetensors.torch import load_file

BLOCKS = 6  # of 128 tokens: not enough for two of the longest sequences
ROWS = [(f"Count {i}. " * (6 + 9 * (i % 5)), f" It is {i}.") for i in range(20)]
JOBS: dict[str, dict[str, Any]] = {
    "all": {"peft": {"r": 8}, "training": {"seed": 1}},
    "attention": {"peft": {"r": 4, "target_modules": ["q_proj", "v_proj"]}},
    "upper": {
        "peft": {"r": 16, "target_modules": ["down_proj"], "layers_to_transform": [1]},
        "training": {"seed": 3, "optim": "sgd", "learning_rate": 0.1},
    },
}


@pytest.fixture(scope="module")
def engine(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> CoServingEngine:
    return CoServingEngine(
        tiny_llama,
        tmp_path_factory.mktemp("state"),
        options={"tpot_ms": 1000, "max_jobs_at_once": 3},
        max_num_seqs=8,
        max_loras=1,
        num_gpu_blocks_override=BLOCKS + 1,
        enable_prefix_caching=False,
    )


def job(folder: Path, name: str, given: Mapping[str, Any], **keys: Any) -> dict[str, Any]:
    folder.mkdir(exist_ok=True, parents=True)
    training = {"max_steps": 8, "train_batch_size": 6, "learning_rate": 2e-3, "save_steps": 3}
    return {
        "name": name,
        "dataset": {"path": str(write_rows(folder / "rows.jsonl", ROWS))},
        "peft": given.get("peft", {}),
        "training": {**training, **given.get("training", {})},
        "output_dir": str(folder / "out"),
        **keys,
    }


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "out" / "adapter_model.safetensors")


@pytest.fixture
def start_at_once(
    engine: CoServingEngine, monkeypatch: pytest.MonkeyPatch
) -> Callable[[int], None]:
    """The next so many jobs meet the scheduler in one step, however long each was prepared."""
    feed = engine.scheduler._feed
    take, awaited = feed.take, 0

    def take_together() -> Any:
        nonlocal awaited
        if feed._ready.qsize() < awaited:
            return None
        awaited = 0
        return take()

    def start(num_jobs: int) -> None:
        nonlocal awaited
        awaited = num_jobs

    monkeypatch.setattr(feed, "take", take_together)
    return start


def run_together(engine: CoServingEngine, jobs: list[dict[str, Any]], on_step: Any = None) -> Any:
    """Records of jobs submitted together; and the most that were in training in a step."""
    pump, most = Pump(engine), 0
    overs = [ended(engine, engine.submit(each)) for each in jobs]

    def count(step: int) -> None:
        nonlocal most
        most = max(most, len(engine.scheduler._runs))
        if on_step is not None:
            on_step(step, pump)

    pump.until(
        lambda: (
            all(over() for over in overs) and pump.answered and not engine.scheduler.has_requests()
        ),
        count,
        timeout=180.0,
    )
    return [engine.store.get(each["name"]) for each in jobs], most


@pytest.fixture(scope="module")
def alone(
    engine: CoServingEngine, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, torch.Tensor]]:
    """What each job trains when no other does."""
    trained = {}
    for name, given in JOBS.items():
        folder = tmp_path_factory.mktemp(name)
        (record,), _ = run_together(engine, [job(folder, f"{name}-alone", given)])
        assert record.status == "succeeded", record.error
        trained[name] = adapter(folder)
    return trained


def check_as_alone(folder: Path, expected: dict[str, torch.Tensor]) -> None:
    ours = adapter(folder)
    assert ours.keys() == expected.keys()
    for name, tensor in expected.items():
        difference = float((ours[name] - tensor).norm() / tensor.norm())
        assert difference < 1e-4, f"{name}: {difference:.1e}"


def test_jobs_trained_at_once_give_the_adapters_that_they_give_alone(
    engine, alone, start_at_once, tmp_path
):
    idle = health(engine, [])
    jobs = [job(tmp_path / name, name, given) for name, given in JOBS.items()]
    prompts = random_prompts(6, 5)

    def ask(step: int, pump: Pump) -> None:
        if step % 7 == 0 and step // 7 < len(prompts):
            pump.ask(Ask(prompts[step // 7], 12))

    start_at_once(len(jobs))
    records, most = run_together(engine, jobs, ask)
    assert [record.status for record in records] == ["succeeded"] * 3
    assert most == 3, "they did not train at once"
    for name in JOBS:
        check_as_alone(tmp_path / name, alone[name])
        assert len(metrics(tmp_path / name / "out")) == 8
    assert health(engine, []) == idle


def test_a_job_that_diverges_leaves_the_others_as_they_are(engine, alone, start_at_once, tmp_path):
    idle = health(engine, [])
    diverging = {"training": {"optim": "sgd", "learning_rate": 1e30, "max_grad_norm": 0.0}}
    start_at_once(2)
    records, most = run_together(
        engine,
        [
            job(tmp_path / "all", "all-beside", JOBS["all"]),
            job(tmp_path / "bad", "diverging", diverging),
        ],
    )
    assert most == 2
    assert [record.status for record in records] == ["succeeded", "failed"]
    assert "diverged" in records[1].error
    check_as_alone(tmp_path / "all", alone["all"])
    assert health(engine, []) == idle


def test_a_cancelled_job_leaves_the_others_as_they_are(engine, alone, start_at_once, tmp_path):
    idle = health(engine, [])
    endless = {"training": {"max_steps": 100_000}}

    def cancel(step: int, pump: Pump) -> None:
        if step == 30:
            engine.store.request_cancel(engine.store.get("endless").id)

    start_at_once(2)
    records, _ = run_together(
        engine,
        [
            job(tmp_path / "endless", "endless", endless),
            job(tmp_path / "attention", "attention-beside", JOBS["attention"]),
        ],
        cancel,
    )
    assert [record.status for record in records] == ["cancelled", "succeeded"]
    check_as_alone(tmp_path / "attention", alone["attention"])
    assert health(engine, []) == idle


def test_jobs_that_each_need_most_of_the_cache_do_not_wait_for_each_other(
    engine, start_at_once, tmp_path
):
    """A sequence takes 4 of the 6 blocks: whoever holds 3 cannot go on while another does."""
    wide = []
    for name in ("wide-1", "wide-2", "wide-3"):
        training = {"training": {"max_steps": 2, "train_batch_size": 4}}
        wide.append(job(tmp_path / name, name, training))
        write_rows(
            tmp_path / name / "rows.jsonl", [("Count 1. " * 88, f" It is {i}.") for i in range(4)]
        )
    start_at_once(len(wide))
    records, most = run_together(engine, wide)
    assert [record.status for record in records] == ["succeeded"] * 3, records[0].error
    assert most > 1


def test_training_is_shared_by_weight(engine, start_at_once, tmp_path, monkeypatch):
    """Where a step has less room than the jobs want, by three to one."""
    work_a_step(monkeypatch, lambda: 64.0)
    long = {"training": {"max_steps": 100_000, "save_steps": 100_000}}
    steps: dict[str, int] = {}

    def stop(step: int, pump: Pump) -> None:
        runs = {run.job.name: run.step for run in engine.scheduler._runs}
        if runs.get("heavy", 0) >= 15 and not steps:
            steps.update(runs)
            for name in ("heavy", "light"):
                engine.store.request_cancel(engine.store.get(name).id)

    start_at_once(2)
    run_together(
        engine,
        [
            job(tmp_path / "heavy", "heavy", long, weight=3.0),
            job(tmp_path / "light", "light", long),
        ],
        stop,
    )
    assert 2.0 <= steps["heavy"] / steps["light"] <= 4.5, steps


def test_job_of_the_highest_priority_starts_first(engine, tmp_path):
    order = []
    engine.scheduler._feed._config.options.__dict__["max_jobs_at_once"] = 1
    try:
        short = {"training": {"max_steps": 1}}
        jobs = [
            job(tmp_path / "blocker", "blocker", {"training": {"max_steps": 10}}),
            job(tmp_path / "low", "low", short),
            job(tmp_path / "high", "high", short, priority=5),
        ]
        records, _ = run_together(engine, jobs)
        order = [r.name for r in sorted(records, key=lambda r: r.started_at)]
    finally:
        engine.scheduler._feed._config.options.__dict__["max_jobs_at_once"] = 3
    assert order.index("high") < order.index("low")
