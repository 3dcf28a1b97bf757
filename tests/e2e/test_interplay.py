"""vLLM's features in requests beside a job: they get what they get alone, the job its adapter."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from harness.beside import (
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
from harness.peft_reference import PeftTrainer
from harness.traffic import Ask, Pump, ended, lora_request, random_prompts
from vllm.sampling_params import BeamSearchParams, SamplingParams, StructuredOutputsParams

SLOTS = 6  # max_num_seqs
BUDGET = 256  # tokens of a step: less than a long prompt or an optimizer step has


@pytest.fixture(scope="module")
def engine(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> CoServingEngine:
    return CoServingEngine(
        tiny_llama,
        tmp_path_factory.mktemp("state"),
        options={"tpot_ms": 1000},  # room for finetuning on any machine
        max_loras=2,
        max_num_seqs=SLOTS,
        max_num_batched_tokens=BUDGET,
    )


@pytest.fixture(scope="module")
def adapters(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """Three random adapters, to be served; two fit a batch."""
    served = []
    for number in (1, 2, 3):
        reference = PeftTrainer(tiny_llama, {"r": 8, "target_modules": ["q_proj", "up_proj"]})
        reference.randomise(number, scale=0.1)
        folder = tmp_path_factory.mktemp("adapters") / f"{number}"
        served.append(lora_request(f"served-{number}", number, reference.save(folder)))
    return served


OWL = {
    "type": "object",
    "properties": {
        "wise": {"type": "boolean"},
        "legs": {"type": "integer", "enum": [1, 2, 4]},
        "moves": {"type": "array", "items": {"enum": ["fly", "sit"]}, "maxItems": 3},
    },
    "required": ["wise", "legs", "moves"],
    "additionalProperties": False,
}
# xgrammar does not know multipleOf: vLLM hands this one to guidance.
COUNT = {
    "type": "object",
    "properties": {"count": {"type": "integer", "multipleOf": 3, "minimum": 0, "maximum": 30}},
    "required": ["count"],
    "additionalProperties": False,
}


def structured(prompt: Any, tokenizer: Any, **constraint: Any) -> Ask:
    """Without white space, of which this model would make no end."""
    blank = [token for token in range(len(tokenizer)) if not tokenizer.decode([token]).strip()]
    sampling = {
        "structured_outputs": StructuredOutputsParams(**constraint),
        "logit_bias": dict.fromkeys(set(blank) - {tokenizer.eos_token_id}, -100.0),
        "ignore_eos": False,
    }
    return Ask(prompt, 80, sampling=sampling)


def long_prompts(engine: CoServingEngine, adapters: list[Any]) -> list[Ask]:
    return [Ask(p, 12) for p in random_prompts(5, 1, (380, 440))]


def structured_output(engine: CoServingEngine, adapters: list[Any]) -> list[Ask]:
    prompts, tokenizer = random_prompts(6, 2), engine.llm.get_tokenizer()
    return [
        structured(prompts[0], tokenizer, json=OWL),
        structured(prompts[1], tokenizer, json=COUNT),
        structured(prompts[2], tokenizer, regex=r"[a-c]{3}-[0-9]{4}"),
        structured(prompts[3], tokenizer, choice=["yes", "no", "perhaps"]),
        structured(prompts[4], tokenizer, grammar='root ::= "owl" | "owl " root'),
        Ask(prompts[5], 40),
    ]


def sampling(engine: CoServingEngine, adapters: list[Any]) -> list[Ask]:
    kinds: list[dict[str, Any]] = [
        {"temperature": 1.0, "seed": 7, "n": 3},
        {"temperature": 0.8, "seed": 8, "top_k": 20, "top_p": 0.9, "min_p": 0.01},
        {"logprobs": 3, "prompt_logprobs": 2},
        {"presence_penalty": 0.5, "frequency_penalty": 0.5, "repetition_penalty": 1.2},
        {"logit_bias": {17: 4.0, 23: 3.0}, "min_tokens": 8, "ignore_eos": False},
        {"allowed_token_ids": list(range(30, 60)), "logprobs": 1},
    ]
    # Short: on CPU, vLLM itself fails where a request with a seed computes a part of its prompt.
    prompts = random_prompts(len(kinds), 3, (4, 40))
    return [Ask(p, 24, sampling=kind) for p, kind in zip(prompts, kinds, strict=True)]


def more_than_slots(engine: CoServingEngine, adapters: list[Any]) -> list[Ask]:
    return [Ask(p, 10 + 4 * i) for i, p in enumerate(random_prompts(2 * SLOTS + 2, 4))]


def all_lora_slots(engine: CoServingEngine, adapters: list[Any]) -> list[Ask]:
    prompts = random_prompts(8, 5, (20, 100))
    return [Ask(p, 30, [None, *adapters][i % 4]) for i, p in enumerate(prompts)]


def some_prompt_is_cut(steps: list[Step]) -> bool:
    """Beside a chunk of training, a request computes a part of its prompt only."""
    rest: dict[str, int] = {}
    for step in steps:
        for request, tokens in step.request_tokens.items():
            if rest.get(request, 0) > 1 < tokens and step.finetuning:
                return True
            rest[request] = tokens
    return False


Requests = Callable[[CoServingEngine, list[Any]], list[Ask]]
REQUESTS: list[tuple[Requests, Callable[[list[Step]], bool]]] = [
    (long_prompts, some_prompt_is_cut),
    (structured_output, lambda steps: True),
    (sampling, lambda steps: True),
    (more_than_slots, lambda steps: any(len(s.request_tokens) == SLOTS for s in steps)),
    (all_lora_slots, lambda steps: True),
]


@pytest.mark.parametrize(
    ("requests", "happened"), REQUESTS, ids=[requests.__name__ for requests, _ in REQUESTS]
)
def test_requests_and_job_get_what_they_get_alone(
    requests: Requests,
    happened: Callable[[list[Step]], bool],
    engine: CoServingEngine,
    undisturbed: Undisturbed,
    adapters: list[Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected, idle = undisturbed
    asks = requests(engine, adapters)
    assert engine.llm.reset_prefix_cache()
    alone = asked(engine, asks)
    assert engine.llm.reset_prefix_cache()
    log = StepLog.attach(engine, monkeypatch)
    assert_same_said(asked_beside(engine, asks, job(tmp_path), log), alone)
    assert len(log.mixed) >= 5, "requests and training hardly shared a step"
    assert happened(log.steps)
    check_same(weights(tmp_path), expected)
    assert health(engine, []) == idle


def test_structured_output_beside_training_is_what_was_demanded(
    engine: CoServingEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backends = set()

    def look(step: int) -> None:
        for request in engine.scheduler.requests.values():
            backends.add(request.sampling_params.structured_outputs._backend)

    asks = structured_output(engine, [])[:2]
    log = StepLog.attach(engine, monkeypatch)
    got = asked_beside(engine, asks, job(tmp_path, max_steps=3), log, look)
    owl, count = (json.loads(one.texts[0][2]) for one in got)
    assert set(owl) == {"wise", "legs", "moves"}
    assert owl["legs"] in (1, 2, 4)
    assert count["count"] % 3 == 0
    assert backends == {"xgrammar", "guidance"}


def test_beam_search_beside_training_finds_the_same_beams(
    engine: CoServingEngine,
    undisturbed: Undisturbed,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    prompts: list[Any] = [{"prompt_token_ids": list(p)} for p in random_prompts(2, 7)]
    params = BeamSearchParams(beam_width=2, max_tokens=12, ignore_eos=True)

    def beams() -> list[Any]:
        found = engine.llm.beam_search(prompts, params, use_tqdm=False)
        return [[sequence.tokens for sequence in one.sequences] for one in found]

    alone = beams()
    log = StepLog.attach(engine, monkeypatch)
    name, pump = engine.submit(job(tmp_path)), Pump(engine)
    pump.until(lambda: any(step.chunk_tokens for step in log.steps))
    assert beams() == alone
    over = ended(engine, name)
    pump.until(lambda: over() and not engine.scheduler.has_requests())
    assert len(log.mixed) >= 5
    check_same(weights(tmp_path), undisturbed[0])


def test_llm_generate_beside_training_answers_the_same(
    engine: CoServingEngine,
    undisturbed: Undisturbed,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    prompts: list[Any] = [{"prompt_token_ids": list(p)} for p in random_prompts(4, 8)]
    params = SamplingParams(temperature=0.0, max_tokens=30, ignore_eos=True)

    def tokens() -> list[Any]:
        found = engine.llm.generate(prompts, params, use_tqdm=False)
        return [list(one.outputs[0].token_ids) for one in found]

    alone = tokens()
    log = StepLog.attach(engine, monkeypatch)
    name, pump = engine.submit(job(tmp_path)), Pump(engine)
    pump.until(lambda: any(step.chunk_tokens for step in log.steps))
    assert tokens() == alone
    over = ended(engine, name)
    pump.until(lambda: over() and not engine.scheduler.has_requests())
    assert len(log.mixed) >= 5
    check_same(weights(tmp_path), undisturbed[0])
