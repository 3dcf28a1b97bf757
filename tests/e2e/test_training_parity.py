"""A run inside the serving engine against transformers + peft: loss, schedule, adapter."""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import sample_text
import torch
from harness import rooms
from harness.engine import CoServingEngine
from harness.peft_loop import DoublePeftTrainer, LoopResult, Row, train_loop
from harness.peft_reference import PeftTrainer, tokenise, write_rows
from harness.traffic import Ask, PlanLog, Pump, lora_request, random_prompts, train
from safetensors.torch import load_file

LOSS = 1e-4  # absolute, at every step
ADAPTER = 1e-3  # |ours - theirs| / |theirs|, Frobenius, of each final A and B
MAX_LENGTH = 384
BLOCK = 128  # tokens of a KV block on CPU
MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PEFT = {"r": 8, "lora_alpha": 16, "target_modules": MODULES}


@pytest.fixture(autouse=True)
def work_a_step(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], float]], None]:
    """A given amount of finetune work a step, whatever the machine's speed, so that a run meets
    the same requests at the same points every time."""

    def give(units: Callable[[], float]) -> None:
        rooms.work_a_step(monkeypatch, units)

    give(lambda: 350.0)
    return give


def generated(count: int, seed: int = 0) -> list[tuple[str, str]]:
    """Prompts and completions of very different lengths."""
    draw = random.Random(seed)
    documents = itertools.islice(sample_text.documents(seed), 200)
    text = [document for document in documents if isinstance(document, str)]
    rows = []
    for number, row in enumerate(sample_text.pirate_rows(count, seed)):
        filler = " ".join(text[draw.randrange(len(text))] for _ in range(draw.choice([0, 1, 6])))
        rows.append((f"{number}: {filler} {row['prompt']}", " " + row["completion"].strip()))
    return rows


def gsm8k(data_dir: Path, count: int) -> list[tuple[str, str]]:
    with (data_dir / "gsm8k_train.jsonl").open() as lines:
        rows = [json.loads(next(lines)) for _ in range(count)]
    return [(row["question"], row["answer"]) for row in rows]


class Case:
    """Rows, a starting adapter, our job on them and the reference's batches."""

    def __init__(
        self,
        model: Path,
        folder: Path,
        rows: Sequence[tuple[str, str]],
        peft: Mapping[str, Any] = PEFT,
        *,
        trained_before: bool = False,
    ) -> None:
        torch.manual_seed(0)
        start = PeftTrainer(model, peft)
        if trained_before:  # B away from 0: every gradient is well above rounding noise
            start.randomise(0, scale=0.2)
        init = start.save(folder / "init")
        self.model, self.init = model, init
        self.reference = DoublePeftTrainer(model, init)
        tokenizer = self.reference.tokenizer
        self.rows: list[Row] = [tokenise(tokenizer, p, c, MAX_LENGTH) for p, c in rows]
        path = write_rows(folder / "train.jsonl", rows)
        ours = dict(peft)
        self.job: dict[str, Any] = {
            "dataset": {"path": str(path), "max_length": MAX_LENGTH, "shuffle": False},
            "peft": {**ours, "init_adapter": str(init)},
            "output_dir": str(folder / "out"),
        }

    def batches(self, batch_size: int, steps: int) -> list[list[Row]]:
        """In the file's order, epoch after epoch, the last batch of an epoch as it comes."""
        epoch = [self.rows[i : i + batch_size] for i in range(0, len(self.rows), batch_size)]
        return (epoch * math.ceil(steps / len(epoch)))[:steps]


def metrics(record: Any) -> list[dict[str, Any]]:
    assert record.status == "succeeded", record.error
    return [json.loads(line) for line in (record.job().output_dir / "metrics.jsonl").open()]


def check(record: Any, expected: LoopResult) -> None:
    steps = [line for line in metrics(record) if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, len(expected.losses) + 1))
    for line, loss, norm, rate in zip(
        steps, expected.losses, expected.grad_norms, expected.learning_rates, strict=True
    ):
        assert line["loss"] == pytest.approx(loss, abs=LOSS), line
        assert line["grad_norm"] == pytest.approx(norm, rel=1e-3), line
        assert line["learning_rate"] == pytest.approx(rate, rel=1e-9, abs=1e-15), line
    ours = load_file(record.job().output_dir / "adapter_model.safetensors")
    assert ours.keys() == expected.adapter.keys()
    for name, theirs in expected.adapter.items():
        assert theirs.abs().max() > 0, f"{name} was never trained"
        difference = (ours[name] - theirs).norm() / theirs.norm()
        assert difference <= ADAPTER, f"{name}: {difference:.1e}"


class RandomRequests:
    """Asks the base model and a served adapter at random steps, once training has begun."""

    def __init__(self, model: Path, folder: Path, seed: int, plans: PlanLog) -> None:
        reference = PeftTrainer(model, PEFT)
        reference.randomise(seed)
        served = lora_request(f"served-{seed}", 1 + seed, reference.save(folder / "served"))
        self.draw, self.models, self.plans = random.Random(seed), [None, served], plans

    def __call__(self, step: int, pump: Pump) -> None:
        draw = self.draw
        if self.plans.chunks and draw.random() < 0.7 and len(pump.answers) < 60:
            prompt = random_prompts(1, draw.randrange(1 << 30), (4, 200))[0]
            pump.ask(Ask(prompt, draw.randint(1, 20), draw.choice(self.models)))


@pytest.mark.parametrize("shuffle", [False, True], ids=["file-order", "shuffled"])
@pytest.mark.parametrize("source", ["generated", "gsm8k"])
def test_thirty_steps_match_transformers_and_peft_under_random_requests(
    source: str,
    shuffle: bool,
    engine: CoServingEngine,
    tiny_llama: Path,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    work_a_step: Callable[[Callable[[], float]], None],
) -> None:
    if source == "gsm8k":
        rows = gsm8k(request.getfixturevalue("data_dir"), 50)
        work_a_step(lambda: 1500.0)
    else:
        rows = generated(50)
        work_a_step(lambda: 500.0)  # a slice of the loss takes 455
    case = Case(tiny_llama, tmp_path, rows)
    case.job["training"] = {
        "learning_rate": 1e-3,
        "max_steps": 30,
        "train_batch_size": 4,
        "save_steps": 10,
    }
    case.job["dataset"]["shuffle"] = shuffle
    plans = PlanLog.attach(engine, monkeypatch)
    traffic = RandomRequests(tiny_llama, tmp_path, 1 + shuffle, plans)

    record, pump = train(engine, case.job, traffic)

    metrics(record)
    assert plans.mixed_steps >= 20, "requests and training hardly shared a step"
    assert len(pump.answers) >= 20
    batches = case.batches(4, 30)
    if shuffle:
        batches = recorded_batches(plans, case.rows)
        assert batches != case.batches(4, 30), "the rows were not shuffled"
    check(record, train_loop(case.reference, batches, learning_rate=1e-3))
    if not shuffle:
        fp32 = PeftTrainer(tiny_llama, {}, adapter_dir=case.init)
        check(record, train_loop(fp32, batches, learning_rate=1e-3))


def recorded_batches(plans: PlanLog, rows: Sequence[Row]) -> list[list[Row]]:
    """Our order of rows, read off the tokens that went into the batches; every row once an
    epoch."""
    by_tokens = {tuple(ids): (ids, labels) for ids, labels in rows}
    assert len(by_tokens) == len(rows), "two rows with the same tokens"
    batches = [[by_tokens[tuple(ids)] for ids in step] for step in plans.step_sequences()]
    epoch = math.ceil(len(rows) / len(batches[0]))
    for first in range(0, len(batches) - epoch + 1, epoch):
        seen = [tuple(ids) for batch in batches[first : first + epoch] for ids, _ in batch]
        assert sorted(seen) == sorted(by_tokens), "an epoch is not every row once"
    return batches


RECIPES: dict[str, dict[str, Any]] = {
    "linear with warm-up": {"warmup_steps": 3},
    "cosine with warm-up": {"lr_scheduler_type": "cosine", "warmup_steps": 2},
    "constant with warm-up": {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 2},
    "weight decay": {"weight_decay": 0.1, "lr_scheduler_type": "constant"},
    "sgd": {"optim": "sgd", "learning_rate": 0.02, "weight_decay": 0.01},
    "no clipping": {"optim": "sgd", "learning_rate": 0.01, "max_grad_norm": 0.0},
    "hard clipping": {"optim": "sgd", "learning_rate": 0.5, "max_grad_norm": 0.05},
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_optimizer_and_schedule_match_torch_and_transformers(
    recipe: str, engine: CoServingEngine, tiny_llama: Path, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"learning_rate": 2e-3, **RECIPES[recipe]}
    # 10 rows by 4: the last batch of each epoch has 2; the second epoch ends the run
    case = Case(tiny_llama, tmp_path, generated(10, seed=3), trained_before=True)
    case.job["training"] = {**settings, "num_train_epochs": 2, "train_batch_size": 4}
    record, _ = train(engine, case.job)
    check(record, train_loop(case.reference, case.batches(4, 6), **settings))


ADAPTERS: dict[str, dict[str, Any]] = {
    "attention, rsLoRA": {
        "r": 16,
        "lora_alpha": 8,
        "use_rslora": True,
        "target_modules": ["q_proj", "v_proj"],
    },
    "MLP of the top layer": {
        "r": 4,
        "lora_alpha": 16,
        "layers_to_transform": [1],
        "target_modules": ["gate_proj", "down_proj"],
    },
    "rank 1": {"r": 1, "lora_alpha": 2, "target_modules": MODULES},
}


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_other_adapters_train_alike(
    adapter: str, engine: CoServingEngine, tiny_llama: Path, tmp_path: Path
) -> None:
    case = Case(tiny_llama, tmp_path, generated(8, seed=4), ADAPTERS[adapter], trained_before=True)
    case.job["training"] = {"learning_rate": 2e-3, "max_steps": 5, "train_batch_size": 4}
    record, _ = train(engine, case.job)
    check(record, train_loop(case.reference, case.batches(4, 5), learning_rate=2e-3))


def test_result_does_not_depend_on_how_steps_are_cut(
    engine: CoServingEngine,
    tiny_llama: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    work_a_step: Callable[[Callable[[], float]], None],
) -> None:
    """Every step gets a random share of finetune work: one chunk of 16 tokens or everything."""
    draw = random.Random(5)
    case = Case(tiny_llama, tmp_path, generated(24, seed=5))
    # 24 sequences a step: several lanes' worth, several sequences a micro-batch
    case.job["training"] = {"learning_rate": 2e-3, "max_steps": 4, "train_batch_size": 24}
    plans = PlanLog.attach(engine, monkeypatch)
    budgets = [0.0, 1.0, 17.0, 17.0, 40.0, 40.0, 40.0, 300.0, 5000.0]
    work_a_step(lambda: draw.choice(budgets))
    record, _ = train(engine, case.job, RandomRequests(tiny_llama, tmp_path, 7, plans))
    assert plans.chunks > 1.3 * 4 * 24, "sequences were hardly cut"
    assert any(len(batch.offsets) > 2 for batch in plans.micro_batches), "nothing was packed"
    assert plans.updates[0] > 1, "one micro-batch a step: nothing was accumulated"
    check(record, train_loop(case.reference, case.batches(24, 4), learning_rate=2e-3))


def test_keys_behind_a_sliding_window_are_kept_for_the_backward(
    tmp_path_factory: pytest.TempPathFactory,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    work_a_step: Callable[[Callable[[], float]], None],
) -> None:
    """vLLM frees the first block of a sequence once the window has left it."""
    from make_model import SLIDING_WINDOW, make_model

    mistral = make_model(tmp_path / "mistral", arch="mistral", size="tiny")
    engine = CoServingEngine(mistral, tmp_path_factory.mktemp("state"), max_num_seqs=4)
    # supervised to the front: a layer carries a gradient back no further than its window
    rows = [(f"Count {i}.", f" It is {i}." * (50 + i)) for i in range(12)]
    case = Case(mistral, tmp_path, rows, trained_before=True)
    assert min(len(ids) for ids, _ in case.rows) > BLOCK + SLIDING_WINDOW + 16
    case.job["training"] = {"learning_rate": 2e-3, "max_steps": 3, "train_batch_size": 4}
    plans = PlanLog.attach(engine, monkeypatch)
    work_a_step(lambda: 100.0)  # a long sequence is cut: vLLM frees before the next chunk
    record, _ = train(engine, case.job)
    assert plans.chunks > 12 + 4
    check(record, train_loop(case.reference, case.batches(4, 3), learning_rate=2e-3))


def test_training_goes_on_from_requests_that_hold_every_slot(
    engine: CoServingEngine, tiny_llama: Path, tmp_path: Path
) -> None:
    """With max_num_seqs requests in flight there is no row for a chunk: training waits."""
    case = Case(tiny_llama, tmp_path, generated(6, seed=6))
    case.job["training"] = {"learning_rate": 2e-3, "max_steps": 3, "train_batch_size": 3}
    slots = engine.scheduler.scheduler_config.max_num_seqs

    def flood(step: int, pump: Pump) -> None:
        if step < 60:
            while engine.scheduler.get_num_unfinished_requests() < slots + 3:
                pump.ask(Ask(random_prompts(1, pump.steps)[0], 12))

    record, pump = train(engine, case.job, flood)
    assert len(pump.answers) >= 2 * slots
    check(record, train_loop(case.reference, case.batches(3, 3), learning_rate=2e-3))


@pytest.fixture(scope="module")
def validated(
    engine: CoServingEngine, tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Any, Any]:
    """A run that evaluates every 2 steps on other rows, and its reference."""
    folder = tmp_path_factory.mktemp("validated")
    case = Case(tiny_llama, folder, generated(12, seed=8))
    other = generated(14, seed=9)
    path = write_rows(folder / "valid.jsonl", other)
    case.job["validation"] = {"path": str(path), "every_steps": 2}
    case.job["training"] = {"learning_rate": 2e-3, "max_steps": 7, "train_batch_size": 4}
    record, _ = train(engine, case.job)
    valid = [tokenise(case.reference.tokenizer, p, c, MAX_LENGTH) for p, c in other]
    expected = train_loop(
        case.reference, case.batches(4, 7), learning_rate=2e-3, valid=valid, every_steps=2
    )
    return record, expected


def test_validation_loss_and_accuracy_match_the_reference(validated: tuple[Any, Any]) -> None:
    record, expected = validated
    lines = {line["step"]: line for line in metrics(record) if "eval_loss" in line}
    assert list(lines) == [2, 4, 6, 7]
    for step, (loss, accuracy) in expected.evals.items():
        assert lines[step]["eval_loss"] == pytest.approx(loss, abs=LOSS)
        assert lines[step]["eval_mean_token_accuracy"] == pytest.approx(accuracy, abs=1e-9)


def test_evaluation_leaves_training_as_it_is(validated: tuple[Any, Any]) -> None:
    check(*validated)


def test_early_stopping_stops_where_the_reference_would(
    engine: CoServingEngine, tiny_llama: Path, tmp_path: Path
) -> None:
    """Trained on one text and validated on another, a large rate makes validation worse soon."""
    case = Case(tiny_llama, tmp_path, generated(4, seed=10))
    other = generated(6, seed=11)[3:]
    path = write_rows(tmp_path / "valid.jsonl", other)
    case.job["validation"] = {"path": str(path), "every_steps": 1}
    settings = {"learning_rate": 2e-2, "lr_scheduler_type": "constant"}
    case.job["training"] = {
        **settings,
        "max_steps": 40,
        "train_batch_size": 4,
        "early_stopping_patience": 2,
    }
    record, _ = train(engine, case.job)
    valid = [tokenise(case.reference.tokenizer, p, c, MAX_LENGTH) for p, c in other]

    stopped_at = len([line for line in metrics(record) if "loss" in line])
    expected = train_loop(case.reference, case.batches(4, stopped_at), **settings, valid=valid)
    worse, best = 0, math.inf
    for step, (loss, _) in expected.evals.items():
        worse = 0 if loss < best else worse + 1
        best = min(best, loss)
        assert (worse == 2) == (step == stopped_at), f"step {step}: {loss} after {best}"
    assert 2 < stopped_at < 40
    check(record, expected)
