"""The production scheduler, vLLM's with ours on top, and a job for it; no model."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
from vllm.engine.arg_utils import EngineArgs
from vllm.utils.import_utils import resolve_obj_by_qualname
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.structured_output import StructuredOutputManager

from benchmarks.simulation.plant import Machine, Shape
from vllm_flexft.config import FinetuneJob
from vllm_flexft.data.dataset import DataReport, TrainingData
from vllm_flexft.data.order import BatchOrder
from vllm_flexft.sched import scheduler as production
from vllm_flexft.sched.prepared import PreparedJob

MEAN_ROW_TOKENS = 200  # of a training sequence


def prepared_job(rows: int, folder: Path, batch: int = 8, seed: int = 0) -> PreparedJob:
    """A job with `rows` sequences of 40 to 360 tokens, all queued."""
    lengths = np.random.default_rng(seed).integers(40, 2 * MEAN_ROW_TOKENS - 40, rows)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    total = int(offsets[-1])
    # Pages of zeros that nobody writes to take no memory.
    tokens, masks = np.zeros(total, np.int32), np.ones(total, bool)
    report = DataReport(rows, rows, 0, 0, 0, total, total - rows, int(lengths.max()))
    job = FinetuneJob.from_mapping(
        {
            "name": "simulated",
            "dataset": {"path": "rows.jsonl"},
            "training": {"train_batch_size": batch, "max_steps": 10**6, "save_steps": 10**9},
            "output_dir": str(folder),
        }
    )
    return PreparedJob(
        job_id="simulated",
        job=job,
        config_hash="",
        output_dir=folder,
        train=TrainingData(tokens, masks, offsets, np.arange(rows), report),
        order=BatchOrder(rows, batch, 0, True, 1.0, 10**6),
        validation=None,
        longest=int(lengths.max()),
        lowest_layer=0,
    )


class Feed:
    """Plays the thread that brings jobs: one is ready at once."""

    def __init__(self, *prepared: PreparedJob) -> None:
        self.retirement = SimpleNamespace(pending=False, in_use=frozenset())
        self.wake: Callable[[], None] = lambda: None
        self.records: list[Any] = []
        self._ready = list(prepared)

    def start(self) -> None: ...

    def stop(self) -> None: ...

    def has_ready(self) -> bool:
        return bool(self._ready)

    def take(self) -> PreparedJob | None:
        return self._ready.pop(0) if self._ready else None

    def report(self, prepared: PreparedJob, record: Any) -> None:
        self.records.append(record)

    def is_cancelled(self, job_id: str) -> bool:
        return False


def write_model(folder: Path, shape: Shape) -> Path:
    """A folder that vLLM takes for a model, as long as nobody loads its weights."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocab,
        "max_position_embeddings": 8192,
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def make_scheduler(
    folder: Path,
    shape: Shape,
    machine: Machine,
    feed: Feed,
    *,
    tpot_ms: float,
    ttft_ms: float,
    max_num_seqs: int,
    max_num_batched_tokens: int,
) -> Any:
    """The scheduler that `vllm serve --co-finetune` would have for this model and machine."""
    options = {"tpot_ms": tpot_ms, "ttft_ms": ttft_ms, "state_dir": str(folder / "state")}
    config = EngineArgs(
        model=str(write_model(folder / "model", shape)),
        dtype="bfloat16",
        max_model_len=4096,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        enable_prefix_caching=False,
        additional_config={"co_finetune": [], "co_finetune_config": options},
    ).create_engine_config()
    config.model_config.skip_tokenizer_init = True  # there is none, and nobody needs it
    config.device_config.device_type = machine.device  # its costs are guessed by it at first
    block_size = config.cache_config.block_size
    spec = FullAttentionSpec(
        block_size=block_size,
        num_kv_heads=shape.kv_heads,
        head_size=shape.head_dim,
        dtype=torch.bfloat16,
    )
    blocks = int(machine.kv_bytes / shape.kv_bytes / block_size)
    config.cache_config.num_gpu_blocks = blocks
    kv_cache = KVCacheConfig(
        num_blocks=blocks,
        kv_cache_tensors=[],
        kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)],
    )
    cls = config.scheduler_config.scheduler_cls
    cls = resolve_obj_by_qualname(cls) if isinstance(cls, str) else cls
    # What an earlier run learnt of step times is of another machine.
    cache = mock.patch.dict(os.environ, VLLM_CACHE_ROOT=str(folder / "cache"))
    with cache, mock.patch.object(production, "JobFeed", return_value=feed):
        return cls(
            vllm_config=config,
            kv_cache_config=kv_cache,
            structured_output_manager=StructuredOutputManager(config),
            block_size=block_size,
        )
