"""What training sees of the served model: frozen weights, caches and the adapter's slots.

The runner builds these from vLLM's modules once the model is loaded; nothing in `train` reaches
into vLLM. Legend: I inputs, O outputs of a linear, R rank, B blocks, N block size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vllm_flexft.graph.families import Family
from vllm_flexft.graph.ops import ModelShape


@dataclass(frozen=True, slots=True)
class FrozenLinear:
    """A base linear y = x W^T + bias, possibly several packed side by side (q, k, v)."""

    name: str  # e.g. "model.layers.0.self_attn.qkv_proj"
    apply: Callable[[Tensor], Tensor]  # (T, I) -> (T, O), as inference computes it
    input_grad: Callable[[Tensor], Tensor]  # (T, O) -> (T, I): dY W
    dtype: torch.dtype
    in_features: int
    splits: tuple[int, ...]  # output width of each packed part
    module: nn.Module  # vLLM's LoRA wrapper, where capture listens


@dataclass(frozen=True, slots=True)
class RMSNorm:
    weight: Tensor
    eps: float
    module: nn.Module


@dataclass(frozen=True, slots=True)
class AttentionGeometry:
    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    sliding_window: int | None
    cos_sin_cache: Tensor  # (max_position, rotary_dim)
    kv_group: int  # index of the KV-cache group that holds this layer
    # (block ids (n,)) -> K (n * N, K heads, E), V likewise: the cached tokens of those blocks
    read_kv: Callable[[Tensor], tuple[Tensor, Tensor]]
    block_size: int
    # K and V of the whole cache, views (B, N, K heads, E), where the backward reads them in place
    # by block table; None: they are gathered with `read_kv` once a layer
    kv_pages: Callable[[], tuple[Tensor, Tensor]] | None = None


@dataclass(frozen=True, slots=True)
class DecoderLayer:
    index: int
    input_norm: RMSNorm
    qkv_proj: FrozenLinear
    q_norm: RMSNorm | None
    k_norm: RMSNorm | None
    attention: AttentionGeometry
    o_proj: FrozenLinear
    post_norm: RMSNorm
    gate_up_proj: FrozenLinear
    down_proj: FrozenLinear

    def linear(self, name: str) -> FrozenLinear:
        return getattr(self, name)


@dataclass(frozen=True, slots=True)
class ServedModel:
    family: Family
    shape: ModelShape
    layers: tuple[DecoderLayer, ...]
    final_norm: RMSNorm
    lm_head: Tensor  # (V padded, D)
    vocab_size: int
    hidden_size: int
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True, slots=True)
class LoraSlot:
    """Views of vLLM's stacked adapter tensors for one target linear, cut to the job's rank."""

    a: Tensor  # (R, I)
    b: Tensor  # (O, R), with the LoRA scaling merged in
