"""The private LoRA slot of a job in training."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm")

from vllm_flexft.runner.slots import open_slot
from vllm_flexft.train.adapter import Target


def test_what_vllm_keeps_beside_the_slot_lies_on_the_slots_device():
    """vLLM pins weights on the host, and cannot pin zeros that share one number."""
    kept = []
    a, b = torch.empty(2, 1, 8, 6, device="meta"), torch.empty(2, 1, 10, 8, device="meta")
    manager = SimpleNamespace(
        device=torch.device("meta"),
        add_adapter=kept.append,
        pin_adapter=lambda lora_int_id: None,
        lora_index_to_id=[None, 7],
        modules={"layer.qkv_proj": SimpleNamespace(lora_a_stacked=[a], lora_b_stacked=[b])},
    )
    target = Target(0, "layer.q_proj", "qkv_proj", 0, 6, 10, slice(0, 10))
    (slot,) = open_slot(SimpleNamespace(_adapter_manager=manager), 7, 4, [target], torch.bfloat16)
    weights = kept[0].loras["layer.q_proj"]
    for tensor, shape in ((weights.lora_a, (4, 6)), (weights.lora_b, (10, 4))):
        assert tensor.device.type == "meta"
        assert tensor.shape == shape
        assert tensor.untyped_storage().nbytes() == torch.bfloat16.itemsize
    assert (slot.a.shape, slot.b.shape) == ((4, 6), (10, 4))
