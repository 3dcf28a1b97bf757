"""The compiler is on, as in a server on CPU by default: what is compiled, and that neither tokens
nor weights depend on it. The engines of other tests are not compiled."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from harness.beside import StepLog, Undisturbed, check_same, job, weights
from harness.engine import CoServingEngine
from harness.rooms import work_a_step
from harness.traffic import Ask, Pump, answers, ended, random_prompts
from vllm.config import CompilationMode
from vllm.model_executor.models.llama import LlamaDecoderLayer


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def compiled(
    request: pytest.FixtureRequest, tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory
) -> CoServingEngine:
    return CoServingEngine(
        tiny_llama,
        tmp_path_factory.mktemp("compiled"),
        dtype=request.param,
        max_num_seqs=24,
        enforce_eager=False,
    )


@pytest.fixture
def eager_layers(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Grows by one whenever a decoder layer is run by Python."""
    calls: list[int] = []
    forward = LlamaDecoderLayer.forward

    def counted(self: LlamaDecoderLayer, *args: object, **kwargs: object) -> object:
        calls.append(1)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(LlamaDecoderLayer, "forward", counted)
    return calls


def test_all_steps_run_the_compiled_model_and_answer_and_learn_the_same(
    compiled: CoServingEngine,
    eager_layers: list[int],
    undisturbed: Undisturbed,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = compiled.core.vllm_config
    assert config.compilation_config.mode == CompilationMode.DYNAMO_TRACE_ONCE
    # Long enough: of such answers most tell steps apart that round differently.
    asks = [Ask(prompt, 48) for prompt in random_prompts(16, 3, (3, 150))]
    compiled.llm.reset_prefix_cache()
    alone = answers(compiled, asks)
    assert not eager_layers

    compiled.llm.reset_prefix_cache()
    work_a_step(monkeypatch, lambda: 600.0)  # chunks and slices in steps of their own
    log = StepLog.attach(compiled, monkeypatch)
    name, pump = compiled.submit(job(tmp_path)), Pump(compiled)
    pump.until(lambda: any(step.chunk_tokens for step in log.steps))
    for ask in asks:
        pump.ask(ask)
    pump.until(lambda: pump.answered)
    pump.until(ended(compiled, name))
    assert not eager_layers
    assert any(step.mixed and step.chunk_tokens for step in log.steps)
    assert any(step.mixed and not step.chunk_tokens for step in log.steps)
    assert pump.in_order() == alone
    if config.model_config.dtype == torch.float32:
        check_same(weights(tmp_path), undisturbed[0])
