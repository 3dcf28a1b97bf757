"""A prepared job without a dataset file, and vLLM's own KV-cache manager without an engine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from harness.training_data import training_data
from make_model import make_tokenizer

from vllm_flexft.config import FinetuneJob
from vllm_flexft.data.order import BatchOrder
from vllm_flexft.graph.ops import ModelShape
from vllm_flexft.sched.admission import EngineLimits
from vllm_flexft.sched.prepared import PreparedJob

BLOCK = 16


@pytest.fixture
def prepare(tmp_path: Path) -> Callable[..., PreparedJob]:
    def make(
        lengths: list[int], valid: list[int] | None = None, every_steps: int = 1, **training: Any
    ) -> PreparedJob:
        mapping: dict[str, Any] = {
            "name": "job",
            "dataset": {"path": "rows.jsonl", "shuffle": False},
            "training": {"train_batch_size": 4, "max_steps": 3, **training},
            "output_dir": str(tmp_path),
        }
        if valid is not None:
            mapping["validation"] = {"path": "valid.jsonl", "every_steps": every_steps}
        job = FinetuneJob.from_mapping(mapping)
        settings = job.training
        return PreparedJob(
            job_id="job",
            job=job,
            config_hash="",
            output_dir=tmp_path,
            train=training_data(lengths),
            order=BatchOrder(
                len(lengths), settings.train_batch_size, 0, False,
                settings.num_train_epochs, settings.max_steps,
            ),
            validation=None if valid is None else training_data(valid),
            longest=max(lengths + (valid or [])),
            lowest_layer=0,
        )  # fmt: skip

    return make


@pytest.fixture
def make_manager() -> Callable[[int], Any]:
    """vLLM's KVCacheManager with `n` usable blocks of BLOCK tokens."""

    def make(blocks: int) -> Any:
        from vllm.v1.core.kv_cache_manager import KVCacheManager
        from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec

        spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=8, dtype=torch.float32)
        config = KVCacheConfig(
            num_blocks=blocks + 1,
            kv_cache_tensors=[],
            kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)],
        )
        return KVCacheManager(
            config, max_model_len=4096, scheduler_block_size=BLOCK, hash_block_size=BLOCK
        )

    return make


@pytest.fixture(scope="module")
def engine_limits() -> EngineLimits:
    return EngineLimits(
        max_model_len=512,
        kv_tokens=384,
        max_lora_rank=16,
        shape=ModelShape("LlamaForCausalLM", 4, 64, 4, 2, 16, 96, 512, False),
        itemsize=4,
        activation_policy="auto",
        memory_bytes=lambda: 1e9,
        jobs_at_once=1,
        device="cpu",
    )


@pytest.fixture(scope="module")
def model_config(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What admission reads of vLLM's, with a real tokenizer."""
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(512, add_bos=True).save_pretrained(folder)
    return SimpleNamespace(
        model="model", tokenizer=str(folder), tokenizer_revision=None, trust_remote_code=False
    )
