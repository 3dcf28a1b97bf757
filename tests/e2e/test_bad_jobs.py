"""Jobs that cannot run are refused with one message, and the engine goes on."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from harness.engine import CoServingEngine
from harness.health import Health, health
from harness.peft_reference import PeftTrainer, write_rows
from harness.traffic import Ask, PlanLog, lora_request, random_prompts, train
from make_model import make_model
from safetensors.torch import load_file, save_file

from vllm_flexft.config import JobError
from vllm_flexft.jobs.records import NameInUseError
from vllm_flexft.runner import hook
from vllm_flexft.train.backward import MicroBatchBackward
from vllm_flexft.train.optimizer import AdapterOptimizer

ROWS = [(f"Say {i}. " * (1 + i % 7), f" It is {i}.") for i in range(12)]
Job = dict[str, Any]


@pytest.fixture(scope="module")
def engine(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> CoServingEngine:
    """A KV cache so small that the blocks of a failed job are soon written by requests."""
    return CoServingEngine(
        tiny_llama,
        tmp_path_factory.mktemp("state"),
        max_loras=2,
        max_lora_rank=16,
        num_gpu_blocks_override=13,
        enable_prefix_caching=False,
    )


@pytest.fixture(scope="module")
def asks(
    engine: CoServingEngine, tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[Ask]:
    """Base and adapter. Together they take every block of the cache, and fill none of them."""
    reference = PeftTrainer(tiny_llama, {"r": 8, "target_modules": ["q_proj", "down_proj"]})
    reference.randomise(1)
    adapter = reference.save(tmp_path_factory.mktemp("adapters") / "served")
    lora = lora_request("served", 1, adapter)
    return [Ask(p, 12, lora if i % 2 else None)
            for i, p in enumerate(random_prompts(12, 1, (3, 20)))]  # fmt: skip


@pytest.fixture(scope="module")
def healthy(engine: CoServingEngine, asks: list[Ask]) -> Health:
    return health(engine, asks)


@pytest.fixture
def job(tmp_path: Path) -> Job:
    path = write_rows(tmp_path / "rows.jsonl", ROWS)
    return {
        "dataset": {"path": str(path), "shuffle": False},
        "peft": {"r": 4},
        "training": {"max_steps": 3, "train_batch_size": 4, "learning_rate": 1e-3},
        "output_dir": str(tmp_path / "out"),
    }


@pytest.fixture
def good_job_still_runs(
    engine: CoServingEngine, asks: list[Ask], healthy: Health, tmp_path: Path
) -> Callable[[], None]:
    def check() -> None:
        assert health(engine, asks) == healthy
        path = write_rows(tmp_path / "good.jsonl", ROWS)
        good = {
            "dataset": {"path": str(path)},
            "training": {"max_steps": 1},
            "output_dir": str(tmp_path / "good"),
        }
        record, _ = train(engine, good)
        assert record.status == "succeeded", record.error

    return check


def rewrite(job: Job, text: str) -> None:
    Path(job["dataset"]["path"]).write_text(text)


def no_file(job: Job) -> None:
    Path(job["dataset"]["path"]).unlink()


def bad_line(job: Job) -> None:
    rewrite(job, '{"prompt": "a", "completion": "b"}\n\n{"prompt": "a", completion: "b"}\n')


def missing_key(job: Job) -> None:
    rewrite(job, '{"prompt": "a", "completion": "b"}\n{"prompt": "a"}\n')


def masked(job: Job) -> None:
    lines = [{"messages": [{"role": "user", "content": "Hello"}]}] * 3
    rewrite(job, "".join(json.dumps(line) + "\n" for line in lines))


def adapter_of(job: Job, peft: dict[str, Any], model: Path) -> Path:
    trainer = PeftTrainer(model, peft)
    trainer.randomise(0)
    folder = trainer.save(Path(job["output_dir"]).parent / "start")
    job["peft"]["init_adapter"] = str(folder)
    return folder


ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def no_adapter(job: Job) -> None:
    job["peft"]["init_adapter"] = str(Path(job["output_dir"]).parent / "nowhere")


def published_by_another(job: Job) -> None:
    out = Path(job["output_dir"])
    out.mkdir()
    (out / "adapter_config.json").write_text("{}")


# What is wrong, and what the message must name: the thing, the value, the remedy.
REFUSED: dict[str, tuple[Callable[[Job], Any], list[str]]] = {
    "dataset missing": (no_file, ["rows.jsonl", "no such file|does not exist|not found"]),
    "dataset empty": (lambda job: rewrite(job, ""), ["rows.jsonl", "empty"]),
    "malformed at line 3": (bad_line, ["rows.jsonl", "line 3|:3", "JSON"]),
    "wrong columns": (
        lambda job: rewrite(job, '{"asked": "a", "said": "b"}\n'),
        ["rows.jsonl", "asked", "said", "columns"],
    ),
    "row without completion": (missing_key, ["rows.jsonl", "line 2|:2", "completion"]),
    "every label masked": (masked, ["rows.jsonl", "every label is masked", "3 rows", "assistant"]),
    "a layer that the model lacks": (
        lambda job: job["peft"].update(layers_to_transform=[1, 2]),
        ["peft.layers_to_transform", "2", r"0\.\.1"],
    ),
    "rank beyond the server's": (
        lambda job: job["peft"].update(r=17),
        [r"peft\.r", "17", "--max-lora-rank 16", "--max-lora-rank 32"],
    ),
    "max_length beyond the model's": (
        lambda job: job["dataset"].update(max_length=600),
        ["max_length", "600", "512", "--max-model-len 601"],
    ),
    "overlong rows that are an error": (
        lambda job: job["dataset"].update(max_length=8, overlong="error"),
        ["max_length", "8", "rows are longer", "truncate"],
    ),
    "init_adapter missing": (no_adapter, ["peft.init_adapter", "nowhere", "adapter_config.json"]),
    "output folder of something else": (
        published_by_another,
        ["out", "no job wrote", "another output_dir"],
    ),
}


@pytest.mark.parametrize("mistake", REFUSED)
def test_job_is_refused_before_training_with_a_message_that_names_it(
    mistake: str, engine: CoServingEngine, job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil, named = REFUSED[mistake]
    spoil(job)
    plans = PlanLog.attach(engine, monkeypatch)
    record, _ = train(engine, job)
    assert record.status == "failed", mistake
    for pattern in named:
        assert_matches(pattern, record.error)
    assert "\n" not in record.error
    assert (plans.chunks, plans.updates) == (0, [])


def assert_matches(pattern: str, text: str) -> None:
    assert re.search(pattern, text), f"{pattern!r} is not in: {text}"


def test_engine_and_next_job_are_unharmed_by_refusals(
    good_job_still_runs: Callable[[], None],
) -> None:
    good_job_still_runs()


START: dict[str, tuple[dict[str, Any], list[str]]] = {
    "other rank": ({"r": 8, "lora_alpha": 16, "target_modules": ALL}, ["r: adapter 8, job 4"]),
    "other alpha": (
        {"r": 4, "lora_alpha": 32, "target_modules": ALL},
        ["lora_alpha: adapter 32, job 16"],
    ),
    "other targets": (
        {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj"]},
        ["target_modules: adapter", "q_proj"],
    ),
    "DoRA": ({"r": 4, "lora_alpha": 16, "target_modules": ALL, "use_dora": True}, ["use_dora"]),
}


@pytest.mark.parametrize("mistake", START)
def test_start_from_an_adapter_that_does_not_fit_is_refused(
    mistake: str, engine: CoServingEngine, job: Job, tiny_llama: Path
) -> None:
    peft, named = START[mistake]
    adapter_of(job, peft, tiny_llama)
    record, _ = train(engine, job)
    assert record.status == "failed"
    for pattern in ["peft.init_adapter", "start", *named]:
        assert_matches(pattern, record.error)


def test_start_from_an_adapter_of_another_model_is_refused(
    engine: CoServingEngine, job: Job, tmp_path: Path
) -> None:
    other = make_model(tmp_path / "other", arch="llama", size="tiny", hidden_size=64)
    adapter_of(job, {"r": 4, "lora_alpha": 16, "target_modules": ALL}, other)
    record, _ = train(engine, job)
    assert record.status == "failed"
    assert_matches("peft.init_adapter.*start.*shape", record.error)


def test_start_from_an_adapter_that_is_not_finite_is_refused(
    engine: CoServingEngine, job: Job, tiny_llama: Path
) -> None:
    folder = adapter_of(job, {"r": 4, "lora_alpha": 16, "target_modules": ALL}, tiny_llama)
    tensors = load_file(folder / "adapter_model.safetensors")
    name = min(tensors)
    tensors[name][0, 0] = torch.inf
    save_file(tensors, folder / "adapter_model.safetensors")
    record, _ = train(engine, job)
    assert record.status == "failed"
    assert_matches(f"peft.init_adapter.*{name}.*not finite", record.error)


def test_activations_that_do_not_fit_the_memory_are_refused(
    engine: CoServingEngine, job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen by the worker alone, as if admission had counted less."""
    opened = hook.OpenedJob
    monkeypatch.setattr(
        hook, "OpenedJob", lambda setup, *rest: opened(replace(setup, memory_bytes=1e5), *rest)
    )
    record, _ = train(engine, job)
    assert record.status == "failed"
    assert_matches("GiB.*memory_gib", record.error)


def test_engine_and_next_job_are_unharmed_by_adapters_that_do_not_fit(
    good_job_still_runs: Callable[[], None],
) -> None:
    good_job_still_runs()


def test_target_module_that_the_model_lacks_is_refused_by_the_job_schema(
    engine: CoServingEngine, job: Job
) -> None:
    job["peft"]["target_modules"] = ["q_proj", "qkv"]
    with pytest.raises(JobError, match=r"peft\.target_modules.*qkv.*down_proj"):
        engine.submit(job)


def test_name_of_another_job_is_refused(engine: CoServingEngine, job: Job) -> None:
    job["name"] = "taken"
    assert train(engine, job)[0].status == "succeeded"
    job["training"]["max_steps"] = 4
    with pytest.raises(NameInUseError, match=r"'taken'.*max_steps: 3 -> 4"):
        engine.submit(job)


def test_name_of_a_served_model_is_refused(engine: CoServingEngine, job: Job) -> None:
    job["name"] = str(engine.model)[-64:].replace("/", "-")
    admission = engine.scheduler._feed._admission
    admission._reserved_names = {job["name"]}
    try:
        record, _ = train(engine, job)
    finally:
        admission._reserved_names = set()
    assert record.status == "failed"
    assert_matches("name: .*already used by a model of this server; choose another", record.error)


# ---- divergence


def diverge_by_rate(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    job["training"].update(optim="sgd", learning_rate=1e30, max_grad_norm=0.0, max_steps=5)


def overflow_in_last_update(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    job["training"].update(optim="sgd", learning_rate=1e38, max_grad_norm=1e38, max_steps=1)
    job["training"].update(lr_scheduler_type="constant")
    original = AdapterOptimizer.update

    def update(self: Any, *args: Any) -> Any:
        self.adapter.grad.mul_(1e6)
        return original(self, *args)

    monkeypatch.setattr(AdapterOptimizer, "update", update)


def nan_loss(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    original = MicroBatchBackward._loss

    def loss(self: Any, part: Any) -> None:
        original(self, part)
        if self.batch.id == 2:
            self.loss_sum += torch.nan

    monkeypatch.setattr(MicroBatchBackward, "_loss", loss)


def inf_gradient(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    original = AdapterOptimizer.update
    calls = itertools.count(1)

    def update(self: Any, *args: Any) -> Any:
        if next(calls) == 2:
            self.adapter.grad[0] = torch.inf
        return original(self, *args)

    monkeypatch.setattr(AdapterOptimizer, "update", update)


DIVERGENCES = {
    diverge_by_rate: "activations are not finite",
    overflow_in_last_update: "adapter weights after step 1 are not finite",
    nan_loss: "loss is nan",
    inf_gradient: "gradient norm is inf",
}


@pytest.mark.parametrize(("diverge", "reason"), DIVERGENCES.items())
def test_divergence_stops_the_job_before_anything_not_finite_is_published(
    diverge: Callable[[Job, pytest.MonkeyPatch], None],
    reason: str,
    engine: CoServingEngine,
    job: Job,
    asks: list[Ask],
    healthy: Health,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    job["training"]["save_steps"] = 1
    write_rows(Path(job["dataset"]["path"]), [(prompt * 6, answer) for prompt, answer in ROWS])
    diverge(job, monkeypatch)
    record, _ = train(engine, job)
    assert record.status == "failed"
    assert_matches(f"training diverged: {reason}.*lower training.learning_rate", record.error)
    out = Path(job["output_dir"])
    assert not (out / "adapter_model.safetensors").exists()
    for weights in out.glob("checkpoint-*/*.safetensors"):
        assert all(t.isfinite().all() for t in load_file(weights).values()), weights
    versions = [v for v in engine.store.versions() if v.job_id == record.id]
    assert all(not version.final for version in versions)
    # Requests now get the blocks that the job had: keys and values of NaN would spoil them.
    assert health(engine, asks) == healthy


def test_next_job_is_unharmed_by_divergence(good_job_still_runs: Callable[[], None]) -> None:
    good_job_still_runs()
