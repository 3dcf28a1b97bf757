"""A decoder of random weights, its forward in float64, and what that leaves for the backward.

No vLLM: the keys and values lie in a paged cache of the layout of vLLM's CUDA backends, the
activations in the trainer's arena. Legend as in `flexft_kernels`.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vllm_flexft.graph.families import FAMILIES
from vllm_flexft.graph.ops import ModelShape
from vllm_flexft.runner.kv_reader import _pages
from vllm_flexft.train.model import (
    AttentionGeometry,
    DecoderLayer,
    FrozenLinear,
    RMSNorm,
    ServedModel,
)

EPS = 1e-5
BLOCK = 4  # tokens of a block of the cache
SHAPE = ModelShape(
    architecture="LlamaForCausalLM",
    num_layers=2,
    hidden_size=24,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    intermediate_size=20,
    vocab_size=37,
    tied_embeddings=False,
)


class SmallDecoder:
    """`served`: as training sees it. Weights are kept by vLLM's names in `weights`."""

    def __init__(self, device: torch.device, sliding_window: int | None, num_blocks: int) -> None:
        self.device, self.sliding_window = device, sliding_window
        self.weights: dict[str, Tensor] = {}
        width = SHAPE.head_dim // 2
        angles = torch.arange(64.0)[:, None] / 100 ** (torch.arange(width) / width)
        self._cos_sin = torch.cat((angles.cos(), angles.sin()), dim=1).to(device)
        # Whatever no sequence owns is NaN: reading it would show.
        cache = (num_blocks, SHAPE.num_kv_heads, BLOCK, 2 * SHAPE.head_dim)
        self.caches = [torch.full(cache, torch.nan, device=device) for _ in range(SHAPE.num_layers)]
        self.served = ServedModel(
            family=FAMILIES[SHAPE.architecture],
            shape=SHAPE,
            layers=tuple(self._layer(i) for i in range(SHAPE.num_layers)),
            final_norm=self._norm("norm"),
            lm_head=self._weight("lm_head", SHAPE.vocab_size, SHAPE.hidden_size),
            vocab_size=SHAPE.vocab_size,
            hidden_size=SHAPE.hidden_size,
            dtype=torch.float32,
            device=device,
        )

    def _weight(self, name: str, *shape: int) -> Tensor:
        self.weights[name] = torch.randn(shape).mul_(shape[-1] ** -0.5).to(self.device)
        return self.weights[name]

    def _norm(self, name: str) -> RMSNorm:
        weight = 1 + 0.1 * torch.randn(SHAPE.hidden_size)
        self.weights[name] = weight.to(self.device)
        return RMSNorm(self.weights[name], EPS, nn.Identity())

    def _linear(self, name: str, splits: tuple[int, ...], width_in: int) -> FrozenLinear:
        weight = self._weight(name, sum(splits), width_in)
        return FrozenLinear(
            name=name,
            apply=lambda x: x @ weight.T,
            input_grad=lambda dy: dy @ weight,
            dtype=torch.float32,
            in_features=width_in,
            splits=splits,
            module=nn.Identity(),
        )

    def _layer(self, index: int) -> DecoderLayer:
        hidden, mlp = SHAPE.hidden_size, SHAPE.intermediate_size
        query, key = SHAPE.num_heads * SHAPE.head_dim, SHAPE.num_kv_heads * SHAPE.head_dim

        def gathered(block_ids: Tensor) -> Any:
            raise AssertionError("the backward gathers keys that it can read in place")

        return DecoderLayer(
            index=index,
            input_norm=self._norm(f"{index}.input_norm"),
            qkv_proj=self._linear(f"{index}.qkv_proj", (query, key, key), hidden),
            q_norm=None,
            k_norm=None,
            attention=AttentionGeometry(
                num_heads=SHAPE.num_heads,
                num_kv_heads=SHAPE.num_kv_heads,
                head_dim=SHAPE.head_dim,
                scale=SHAPE.head_dim**-0.5,
                sliding_window=self.sliding_window,
                cos_sin_cache=self._cos_sin,
                kv_group=0,
                read_kv=gathered,
                block_size=BLOCK,
                kv_pages=lambda: _pages(self.caches[index]),
            ),
            o_proj=self._linear(f"{index}.o_proj", (hidden,), query),
            post_norm=self._norm(f"{index}.post_norm"),
            gate_up_proj=self._linear(f"{index}.gate_up_proj", (mlp, mlp), hidden),
            down_proj=self._linear(f"{index}.down_proj", (hidden,), mlp),
        )


@dataclasses.dataclass(frozen=True)
class Forward:
    """float64: kept[layer, name], (T, width) as in train/activations.py; K and V (T, K, E) of each
    layer; the loss."""

    kept: dict[tuple[int, str], Tensor]
    keys: list[tuple[Tensor, Tensor]]
    loss: Tensor


def forward(
    model: SmallDecoder,
    adapter: dict[tuple[int, str], list[tuple[slice, Tensor, Tensor]]],
    x_TD: Tensor,
    targets_T: Tensor,
    offsets: tuple[int, ...],
) -> Forward:
    """Sequences `offsets[i] : offsets[i + 1]` of x, by plain autograd.

    adapter: (layer, packed linear) -> columns, A and B with the scaling in it. targets: -100 where
    a row predicts nothing. The loss is a sum.
    """
    weights = {name: weight.double() for name, weight in model.weights.items()}
    query = SHAPE.num_heads * SHAPE.head_dim
    key = SHAPE.num_kv_heads * SHAPE.head_dim
    positions = torch.cat([torch.arange(b - a) for a, b in itertools.pairwise(offsets)])
    cos, sin = model._cos_sin[positions.to(model.device)].double().unsqueeze(1).chunk(2, dim=-1)
    kept: dict[tuple[int, str], Tensor] = {}
    keys = []

    def norm(x: Tensor, name: str) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), weights[name], EPS)

    def linear(x: Tensor, layer: int, name: str) -> Tensor:
        parts = [x @ weights[f"{layer}.{name}"].T]
        for columns, a, b in adapter.get((layer, name), []):
            more = F.pad(x @ a.T @ b.T, (columns.start, parts[0].shape[1] - columns.stop))
            parts.append(more)
        return torch.stack(parts).sum(0)

    def rope(x_THE: Tensor) -> Tensor:
        x1, x2 = x_THE.chunk(2, dim=-1)
        return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1)

    x = x_TD.double()
    for layer in range(SHAPE.num_layers):
        kept[layer, "residual_in"] = x
        qkv = linear(norm(x, f"{layer}.input_norm"), layer, "qkv_proj")
        kept[layer, "qkv"] = qkv
        q, k, v = (y.unflatten(1, (-1, SHAPE.head_dim)) for y in qkv.split([query, key, key], 1))
        q, k = rope(q), rope(k)
        keys.append((k, v))
        parts = [
            _attention(q[a:b], k[a:b], v[a:b], model.sliding_window)
            for a, b in itertools.pairwise(offsets)
        ]
        kept[layer, "attention"] = torch.cat(parts).flatten(1)
        x = x + linear(kept[layer, "attention"], layer, "o_proj")
        kept[layer, "residual_mid"] = x
        gate_up = linear(norm(x, f"{layer}.post_norm"), layer, "gate_up_proj")
        kept[layer, "gate_up"] = gate_up
        gate, up = gate_up.chunk(2, dim=1)
        x = x + linear(F.silu(gate) * up, layer, "down_proj")
    kept[SHAPE.num_layers, "residual_in"] = x
    logits = norm(x, "norm") @ weights["lm_head"].T
    loss = F.cross_entropy(logits, targets_T.to(model.device), reduction="sum")
    return Forward(kept, keys, loss)


def _attention(q: Tensor, k: Tensor, v: Tensor, sliding_window: int | None) -> Tensor:
    distance = torch.arange(len(q))[:, None] - torch.arange(len(q))
    visible = distance >= 0
    if sliding_window is not None:
        visible &= distance < sliding_window
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=visible.to(q.device), scale=SHAPE.head_dim**-0.5, enable_gqa=True
    )
    return out[0].transpose(0, 1)
