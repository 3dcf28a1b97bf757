"""`flexft plan` on models that are nothing but a config."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, LlamaConfig

from vllm_flexft.cli.main import main
from vllm_flexft.cli.sizing import JobPlan, plan_job
from vllm_flexft.config import FinetuneJob
from vllm_flexft.graph.ops import ModelShape

# The published configs of Llama-3.1.
LLAMA: dict[str, dict[str, int]] = {
    "8B": dict(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
    ),
    "70B": dict(
        hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64,
    ),
}  # fmt: skip
Write = Callable[..., str]


def writer(folder: Path) -> Write:
    """Writes `folder`/model: the config of a Llama-3.1 and nothing else."""

    def make(size: str = "8B", **changes: Any) -> str:
        config = LlamaConfig(
            **LLAMA[size], architectures=["LlamaForCausalLM"], dtype="bfloat16", vocab_size=128_256,
            num_key_value_heads=8, max_position_embeddings=131_072,
        )  # fmt: skip
        for name, value in changes.items():
            setattr(config, name, value)
        config.save_pretrained(folder / "model")
        return str(folder / "model")

    return make


def sized(model: str, **options: Any) -> JobPlan:
    job = {"name": "job", "dataset": {"path": "rows.jsonl"}, "peft": {"r": 16}}
    return plan_job(
        ModelShape.from_hf_config(AutoConfig.from_pretrained(model)),
        FinetuneJob.from_mapping({**job, **options.pop("job", {})}),
        **{"dtype": "bfloat16", "budget_gib": float("inf"), **options},
    )


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    status = main(["plan", *arguments, "--no-profile"])
    captured = capsys.readouterr()
    return status, captured.out, captured.err
