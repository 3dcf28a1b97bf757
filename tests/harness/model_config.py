"""A model's config.json alone: enough for what is decided before an engine exists."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import LlamaConfig, PretrainedConfig


def save_config(
    folder: Path,
    cls: type[PretrainedConfig] = LlamaConfig,
    architecture: str = "LlamaForCausalLM",
    **changes: Any,
) -> str:
    cls(
        architectures=[architecture],
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=128,
        max_position_embeddings=128,
        **changes,
    ).save_pretrained(folder)
    return str(folder)
