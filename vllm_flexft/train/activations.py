"""What the forward pass leaves behind for the backward pass.

A lane holds one micro-batch: for every captured (layer, tensor) a buffer of `lane_tokens` rows,
allocated once when the job opens. Rows are filled by the capture hooks, chunk by chunk, in any
order. Keys and values are not here: they are read back from the paged cache.

Tensors a layer may leave (Legend: T tokens, D hidden, H query heads, K KV heads, E head dim,
F MLP width):
    residual_in   (T, D)   input of the layer, before its norm
    qkv           (T, (H+2K)E) or its leading part: projections before qk-norm and rope
    attention     (T, H E) attention output, input of o_proj
    residual_mid  (T, D)   after attention was added, before the MLP's norm
    gate_up       (T, 2F)  input of the gated activation
and the stage above the last layer leaves `residual_in` only: the input of the final norm.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from vllm_flexft.train.model import ServedModel

RECOMPUTABLE = ("gate_up", "qkv")  # cheapest bytes-for-FLOP first


def tensor_widths(model: ServedModel) -> dict[str, int]:
    """Columns of each captured tensor of a layer."""
    layer = model.layers[0]
    geometry = layer.attention
    query = geometry.num_heads * geometry.head_dim
    key = geometry.num_kv_heads * geometry.head_dim
    return {
        "residual_in": model.hidden_size,
        # the backward of a norm reads its input, so qk-norm keeps the keys' projections as well
        "qkv": query + key if model.family.qk_norm else query,
        "attention": query,
        "residual_mid": model.hidden_size,
        "gate_up": sum(layer.gate_up_proj.splits),
    }


def bytes_per_token(model: ServedModel, lowest_layer: int, stored: Iterable[str]) -> int:
    widths = tensor_widths(model)
    per_layer = sum(widths[name] for name in stored)
    layers = len(model.layers) - lowest_layer
    return (per_layer * layers + widths["residual_in"]) * model.dtype.itemsize


def choose_stored(
    model: ServedModel, lowest_layer: int, tokens: int, budget_bytes: float
) -> tuple[str, ...]:
    """The tensors to keep under a byte budget; what does not fit is recomputed in the backward.

    Raises ValueError when not even the least set fits, with the budget that would do.
    """
    stored = list(tensor_widths(model))
    for name in (None, *RECOMPUTABLE):
        if name is not None:
            stored.remove(name)
        need = bytes_per_token(model, lowest_layer, stored) * tokens
        if need <= budget_bytes:
            return tuple(stored)
    enough = math.ceil(1000 * need / 2**30) / 1000  # in GiB, never rounded down
    raise ValueError(
        f"activations of {tokens} tokens need {enough:.3f} GiB, the budget is "
        f"{budget_bytes / 2**30:.3f} GiB; raise memory_gib or lower dataset.max_length"
    )


class ActivationStore:
    """Lanes of captured activations; rows are tokens of a micro-batch, in its order."""

    def __init__(
        self,
        model: ServedModel,
        lowest_layer: int,
        stored: tuple[str, ...],
        lane_tokens: int,
        num_lanes: int,
    ) -> None:
        widths = tensor_widths(model)
        top = len(model.layers)
        keys = [(layer, name) for layer in range(lowest_layer, top) for name in stored]
        keys.append((top, "residual_in"))
        self.stored = frozenset(stored)
        self.lanes: list[dict[tuple[int, str], Tensor]] = [
            {
                (layer, name): torch.empty(
                    lane_tokens, widths[name], dtype=model.dtype, device=model.device
                )
                for layer, name in keys
            }
            for _ in range(num_lanes)
        ]

    def holds(self, layer: int, name: str) -> bool:
        return (layer, name) in self.lanes[0]

    def rows(self, lane: int, layer: int, name: str, start: int, stop: int) -> Tensor:
        return self.lanes[lane][layer, name][start:stop]
