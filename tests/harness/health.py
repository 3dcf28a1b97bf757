"""What must be as before once a job is over, however it ended."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from harness.engine import CoServingEngine
from harness.traffic import Ask, answers


@dataclass(frozen=True)
class Health:
    """A snapshot; two of an idle engine must be equal."""

    free_blocks: int
    runner_requests: tuple[str, ...]
    batch_requests: int
    training_adapters: tuple[int, ...]  # in vLLM's LoRA manager
    hooks: int  # on the model's modules
    lender_holds: int
    answers: list[list[int]]


def health(engine: CoServingEngine, asks: list[Ask]) -> Health:
    """Answers `asks` first, so that requests which ended in the last step are cleaned up."""
    from vllm_flexft.wiring import TRAINING_LORA_ID_BASE

    said = answers(engine, asks)
    while engine.scheduler.has_requests():
        engine.llm.llm_engine.step()
    runner: Any = engine.core.model_executor.driver_worker.worker.model_runner
    scheduler = engine.scheduler
    modules = runner.get_model().modules()
    return Health(
        free_blocks=scheduler.kv_cache_manager.block_pool.get_num_free_blocks(),
        runner_requests=tuple(runner.requests),
        batch_requests=runner.input_batch.num_reqs,
        training_adapters=tuple(
            number
            for number in runner.lora_manager.list_adapters()
            if number >= TRAINING_LORA_ID_BASE
        ),
        hooks=sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules),
        lender_holds=scheduler._lender.num_blocks,
        answers=said,
    )
