"""The private LoRA slot that a job in training occupies in vLLM's adapter manager."""

from __future__ import annotations

from typing import Any

import torch
from vllm.lora.lora_model import LoRAModel
from vllm.lora.lora_weights import LoRALayerWeights

from vllm_flexft.train.adapter import Target
from vllm_flexft.train.model import LoraSlot


def open_slot(
    lora_manager: Any, lora_int_id: int, rank: int, targets: list[Target], dtype: torch.dtype
) -> list[LoraSlot]:
    """Register, activate and pin a zero adapter; returns views of its weights, one a target.

    `lora_manager` is the worker's `LRUCacheWorkerLoRAManager`. Must run after warm-up, which
    removes every adapter.
    """
    manager = lora_manager._adapter_manager
    # vLLM keeps what it is given beside the slot: one number stands for all these zeros. It lies on
    # the slot's device, since vLLM pins what is on the host, which needs a number each.
    zero = torch.zeros((), dtype=dtype, device=manager.device)
    loras = {
        target.peft_name: LoRALayerWeights(
            target.peft_name,
            rank,
            rank,  # alpha = rank: scaling 1, ours is merged into B when the slot is filled
            zero.expand(rank, target.in_features),
            zero.expand(target.out_features, rank),
        )
        for target in targets
    }
    manager.add_adapter(LoRAModel(lora_int_id, rank, loras))
    manager.pin_adapter(lora_int_id)
    slot = manager.lora_index_to_id.index(lora_int_id)
    views = []
    for target in targets:
        packed_name = f"{target.peft_name.rsplit('.', 1)[0]}.{target.packed}"
        module = manager.modules[packed_name]
        part = target.part_index
        views.append(
            LoraSlot(
                a=module.lora_a_stacked[part][slot, 0, :rank, : target.in_features],
                b=module.lora_b_stacked[part][slot, 0, : target.out_features, :rank],
            )
        )
    return views


def close_slot(lora_manager: Any, lora_int_id: int) -> None:
    manager = lora_manager._adapter_manager
    manager.remove_adapter(lora_int_id)
