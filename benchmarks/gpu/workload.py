"""The model and the training rows of the GPU benchmark: shapes of Llama-3.1-8B, dummy weights."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PEFT = {"r": 16, "lora_alpha": 32}
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True, kw_only=True)
class Size:
    """A model, and how it is trained and served.

    Args:
        length: tokens of a training row, all supervised.
        batch: rows of an optimizer step.
        micro_batches: rows of a forward that the dedicated trainer tries.
    """

    config: dict[str, int]
    dtype: str
    length: int
    batch: int
    micro_batches: tuple[int, ...]
    max_model_len: int


LLAMA_8B = Size(
    config=dict(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, head_dim=128, vocab_size=128256, max_position_embeddings=8192,
    ),
    dtype="bfloat16",
    length=1024,
    batch=16,
    micro_batches=(1, 2, 4, 8, 16),
    max_model_len=8192,
)  # fmt: skip
TINY = Size(
    config=dict(
        hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=64, vocab_size=2048, max_position_embeddings=512,
    ),
    dtype="bfloat16",
    length=24,
    batch=4,
    micro_batches=(2, 4),
    max_model_len=256,
)  # fmt: skip


def write_model(folder: Path, size: Size) -> Path:
    """A config and a tokenizer of one token a word; no weights (`--load-format dummy`)."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, PreTrainedTokenizerFast

    config = LlamaConfig(
        **size.config,
        rms_norm_eps=1e-5,
        rope_theta=500000.0,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
        architectures=["LlamaForCausalLM"],
        dtype=size.dtype,
    )
    config.save_pretrained(folder)
    words = {_word(i): i for i in range(size.config["vocab_size"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token=_word(0)))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=_word(0),
        bos_token=_word(1),
        eos_token=_word(2),
        pad_token=_word(0),
        model_max_length=size.max_model_len,
    ).save_pretrained(folder)
    return folder


def write_rows(path: Path, size: Size, count: int = 256) -> Path:
    """Rows of exactly `length` tokens once EOS is appended; every token is supervised."""
    rng, vocab = random.Random(0), range(10, size.config["vocab_size"])
    rows = (rng.choices(vocab, k=size.length - 1) for _ in range(count))
    lines = (json.dumps({"text": " ".join(map(_word, row))}) + "\n" for row in rows)
    path.write_text("".join(lines))
    return path


def _word(token: int) -> str:
    return f"t{token}"


def job(rows: Path, size: Size, output_dir: Path) -> dict[str, Any]:
    """It trains as long as the server runs."""
    return {
        "name": "bench",
        "dataset": {"path": str(rows), "max_length": size.length, "shuffle": False},
        "peft": {**PEFT, "target_modules": LINEARS},
        "training": {
            "max_steps": 1_000_000,
            "train_batch_size": size.batch,
            "save_steps": 1_000_000,
            "lr_scheduler_type": "constant",
        },
        "output_dir": str(output_dir),
    }


def trained_parameters(size: Size) -> int:
    """Those that a token is multiplied by: linears and LM head, without embedding and norms."""
    c = size.config
    heads = c["head_dim"] * (2 * c["num_attention_heads"] + 2 * c["num_key_value_heads"])
    layer = c["hidden_size"] * (heads + 3 * c["intermediate_size"])
    return c["num_hidden_layers"] * layer + c["hidden_size"] * c["vocab_size"]


def mfu(tokens_per_second: float, size: Size, flop_per_second: float) -> float:
    """Of a trained token's 4 FLOP a parameter (forward 2, dX 2; frozen weights have no dW);
    attention's products of queries, keys and values are left out."""
    return 4 * trained_parameters(size) * tokens_per_second / flop_per_second
