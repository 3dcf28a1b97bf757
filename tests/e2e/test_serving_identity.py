"""Requests are answered with the same tokens whether a job trains or not, by the right weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from harness.engine import CoServingEngine
from harness.peft_reference import PeftTrainer, write_rows
from harness.traffic import Ask, PlanLog, Pump, answers, ended, lora_request, random_prompts, train

from vllm_flexft.wiring import SERVED_LORA_ID_BASE

MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PEFT = {"r": 8, "lora_alpha": 16, "target_modules": MODULES}


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def typed_engine(
    request: pytest.FixtureRequest, tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory
) -> CoServingEngine:
    return CoServingEngine(
        tiny_llama,
        tmp_path_factory.mktemp("state"),
        dtype=request.param,
        options={"tpot_ms": 1000},  # room for finetuning on any machine
        max_loras=2,
        max_num_seqs=24,
    )


def rows(count: int) -> list[tuple[str, str]]:
    return [(f"Question {i}: " + "how many owls? " * (i % 5), f" {i} owls.") for i in range(count)]


def job(folder: Path, **training: Any) -> dict[str, Any]:
    path = write_rows(folder / "rows.jsonl", rows(24))
    defaults = {"train_batch_size": 8, "learning_rate": 2e-2, "max_steps": 6}
    return {
        "dataset": {"path": str(path)},
        "peft": PEFT,
        "training": {**defaults, **training},
        "output_dir": str(folder / "out"),
    }


def random_adapter(model: Path, folder: Path, seed: int) -> Path:
    reference = PeftTrainer(model, PEFT)
    reference.randomise(seed, scale=0.1)
    return reference.save(folder)


@pytest.mark.parametrize("same_length", [False, True], ids=["mixed-lengths", "same-length"])
def test_twelve_concurrent_requests_get_the_same_tokens_during_finetuning(
    same_length: bool,
    typed_engine: CoServingEngine,
    tiny_llama: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = typed_engine
    adapter = random_adapter(tiny_llama, tmp_path / "served", 1)
    served = lora_request(f"served-{same_length}", 1 + same_length, adapter)
    lengths = (64, 64) if same_length else (3, 150)
    asks = [
        Ask(prompt, 32, served if i % 2 else None)
        for i, prompt in enumerate(random_prompts(12, 2, lengths))
    ]
    engine.llm.reset_prefix_cache()
    alone = answers(engine, asks)
    engine.llm.reset_prefix_cache()

    plans = PlanLog.attach(engine, monkeypatch)
    name, pump = engine.submit(job(tmp_path, max_steps=400)), Pump(engine)
    pump.until(lambda: plans.chunks > 0)
    before = plans.mixed_steps
    for ask in asks:
        pump.ask(ask)
    pump.until(lambda: pump.answered)

    assert plans.mixed_steps - before >= 5, "requests and training hardly shared a step"
    engine.store.request_cancel(engine.store.get(name).id)
    over = ended(engine, name)
    pump.until(over)
    assert pump.in_order() == alone
    assert len({tuple(tokens) for tokens in alone}) == 12


def peft_greedy(model: Path, adapter: Path | None, prompts: Sequence[Any], count: int) -> list:
    """Greedy tokens of transformers, with PEFT's adapter; no cache, no generate()."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    reference: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    if adapter is not None:
        reference = PeftModel.from_pretrained(reference, adapter)
    result = []
    for prompt in prompts:
        tokens = list(prompt)
        for _ in range(count):
            with torch.no_grad():
                tokens.append(int(reference(torch.tensor([tokens])).logits[0, -1].argmax()))
        result.append(tokens[len(prompt) :])
    return result


@pytest.fixture(scope="module")
def published(
    engine: CoServingEngine, tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """A finished job; its versions by served name, as the API server would number them."""
    folder = tmp_path_factory.mktemp("published")
    wanted = {**job(folder, save_steps=2, save_total_limit=None), "name": "owls"}
    record, _ = train(engine, wanted)
    assert record.status == "succeeded", record.error
    return {
        version.name: lora_request(version.name, SERVED_LORA_ID_BASE + version.id, version.path)
        for version in engine.store.versions()
        if version.job_id == record.id
    }


def test_every_version_answers_as_peft_does(
    engine: CoServingEngine, tiny_llama: Path, published: dict[str, Any]
) -> None:
    assert set(published) == {"owls@step-2", "owls@step-4", "owls@step-6", "owls"}
    prompts = random_prompts(6, 3, (4, 100))
    for name, version in published.items():
        ours = answers(engine, [Ask(prompt, 16, version) for prompt in prompts])
        assert ours == peft_greedy(tiny_llama, Path(version.lora_path), prompts, 16), name


def test_finetuning_changed_what_the_model_says(
    engine: CoServingEngine, published: dict[str, Any]
) -> None:
    prompts = random_prompts(4, 4, (4, 200))
    said = {
        str(answers(engine, [Ask(prompt, 16, published.get(name)) for prompt in prompts]))
        for name in ("base", "owls@step-2", "owls@step-4", "owls")
    }
    assert len(said) == 4


def test_cached_prefixes_never_answer_for_another_version(
    engine: CoServingEngine, tiny_llama: Path, published: dict[str, Any], tmp_path: Path
) -> None:
    """One prompt of several KV blocks, asked of every model before, during and after a job that
    publishes new versions: blocks are hit in the prefix cache, each model's own."""
    (prompt,) = random_prompts(1, 5, (400, 400))
    old = {"base": None, "owls@step-2": published["owls@step-2"], "owls": published["owls"]}
    folders = {name: version and Path(version.lora_path) for name, version in old.items()}
    expected = {
        name: peft_greedy(tiny_llama, folder, [prompt], 12)[0] for name, folder in folders.items()
    }

    def check_all(models: dict[str, Any]) -> None:
        for _ in range(2):  # the second time from the cache
            got = answers(engine, [Ask(prompt, 12, version) for version in models.values()])
            assert dict(zip(models, got, strict=True)) == {name: expected[name] for name in models}

    hits_before = prefix_hits(engine)
    check_all(old)
    seen = 0

    def between(step: int, pump: Pump) -> None:
        nonlocal seen
        if step % 3 == 2:
            seen += 1
            check_all(old)

    more = {**job(tmp_path, save_steps=3, learning_rate=4e-2), "name": "more-owls"}
    record, _ = train(engine, more, between)
    assert record.status == "succeeded", record.error
    assert seen >= 1
    new = {
        version.name: lora_request(version.name, SERVED_LORA_ID_BASE + version.id, version.path)
        for version in engine.store.versions()
        if version.job_id == record.id
    }
    for name, version in new.items():
        expected[name] = peft_greedy(tiny_llama, Path(version.lora_path), [prompt], 12)[0]
    check_all({**old, **new})
    assert expected["more-owls"] not in (expected["owls"], expected["base"])
    assert prefix_hits(engine) - hits_before >= 5 * 3 * 128, "the prefix cache was not used"


def prefix_hits(engine: CoServingEngine) -> int:
    return engine.scheduler.hit_tokens


@pytest.fixture(autouse=True)
def count_prefix_hits(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens found in the prefix cache, counted where vLLM's scheduler asks for them."""
    if "engine" not in request.fixturenames:
        return
    scheduler = request.getfixturevalue("engine").scheduler
    find = scheduler.kv_cache_manager.get_computed_blocks
    scheduler.hit_tokens = 0

    def counted(*args: Any, **kwargs: Any) -> Any:
        result = find(*args, **kwargs)
        scheduler.hit_tokens += result[1]
        return result

    monkeypatch.setattr(scheduler.kv_cache_manager, "get_computed_blocks", counted)
