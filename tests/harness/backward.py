"""The trainer's backward on random activations, without an engine's step around it.

Weights are those of a served model; what its forward would have left is random.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vllm_flexft.config import FinetuneJob
from vllm_flexft.plan import MicroBatch, OpenJob, Windows
from vllm_flexft.train.adapter import Target
from vllm_flexft.train.model import LoraSlot, ServedModel
from vllm_flexft.train.trainer import Trainer

RANK = 8


def trainer_of(
    model: ServedModel,
    tokens: int,
    window: int,
    policy: Any = "auto",
    *,
    peft: Mapping[str, Any] | None = None,
    memory_bytes: float = float("inf"),
) -> Trainer:
    """A trainer with one lane of `tokens`, full of random numbers."""

    def slots(targets: list[Target]) -> list[LoraSlot]:
        sizes = ((t.in_features, t.out_features) for t in targets)
        new = partial(torch.empty, device=model.device)
        return [LoraSlot(new(RANK, i), new(o, RANK)) for i, o in sizes]

    job = {"name": "job", "dataset": {"path": "rows.jsonl"}, "peft": {"r": RANK, **(peft or {})}}
    setup = OpenJob(
        job_id="job",
        job=FinetuneJob.from_mapping(job),
        config_hash="",
        output_dir="",
        base_model="",
        lora_int_id=1,
        windows=Windows(layer=window, loss=max(1, window // 2)),
        lane_tokens=tokens,
        num_lanes=1,
        activation_policy=policy,
        memory_bytes=memory_bytes,
        resume_from=None,
    )
    made = Trainer(setup, model, slots, memory_bytes)
    made.adapter.master.normal_(std=0.05)  # B too: at zero it would hide what A's gradients read
    made.adapter.push()
    made.store._arena.normal_()
    return made


def with_random_keys(model: ServedModel) -> ServedModel:
    """The served model, its KV cache replaced by random numbers."""

    def replaced(geometry: Any) -> Any:
        shape = (geometry.num_kv_heads, geometry.head_dim)

        def read(blocks: Tensor) -> tuple[Tensor, Tensor]:
            k, v = torch.randn(2, len(blocks) * geometry.block_size, *shape)
            return k, v

        return dataclasses.replace(geometry, read_kv=read)

    layers = (dataclasses.replace(x, attention=replaced(x.attention)) for x in model.layers)
    return dataclasses.replace(model, layers=tuple(layers))


def backward(trainer: Trainer, tokens: int) -> None:
    """All slices of one sequence of `tokens` tokens; gradients are in `trainer.adapter.grad`."""
    batch = MicroBatch(
        id=1,
        lane=0,
        token_ids=np.arange(tokens, dtype=np.int32),
        supervised=np.ones(tokens, dtype=bool),
        offsets=(0, tokens),
        loss_scale=1.0,
        train=True,
    )
    trainer.begin((batch,))
    block_size = trainer.model.layers[0].attention.block_size
    blocks = list(range(-(-tokens // block_size)))
    count = trainer._micro_batches[1].grid.num_slices
    trainer._micro_batches[1].locate_kv(((blocks,),))
    trainer._micro_batches.pop(1).run(count)
