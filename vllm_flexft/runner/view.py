"""Builds the trainer's view of the served model from vLLM's modules (see train/model.py)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig

from vllm_flexft.graph.families import family_of
from vllm_flexft.graph.ops import ModelShape
from vllm_flexft.runner.base_weight import input_grad_of
from vllm_flexft.runner.kv_reader import kv_pages_for, kv_reader_for
from vllm_flexft.train.model import (
    AttentionGeometry,
    DecoderLayer,
    FrozenLinear,
    RMSNorm,
    ServedModel,
)


def served_model(
    model: nn.Module, vllm_config: VllmConfig, kv_group_of: dict[str, int]
) -> ServedModel:
    """`kv_group_of`: attention layer name -> index of its KV-cache group.

    Raises ValueError for a model whose forward has steps that the backward does not know.
    """
    architecture = type(model).__name__
    family = family_of(architecture)
    logits_processor: Any = model.logits_processor
    if getattr(logits_processor, "scale", 1.0) != 1.0 or getattr(
        logits_processor, "soft_cap", None
    ):
        raise ValueError(f"{architecture} with scaled or capped logits cannot be co-finetuned")
    inner: Any = model.model
    layers = tuple(
        _decoder_layer(index, layer, kv_group_of) for index, layer in enumerate(inner.layers)
    )
    lm_head: Any = model.lm_head
    head_weight = getattr(lm_head, "flexft_weight", None)
    if head_weight is None:
        head_weight = lm_head.weight
    assert head_weight.ndim == 2, head_weight.shape
    assert head_weight.numel() > 0, "LM head weight was packed away"
    config = vllm_config.model_config
    return ServedModel(
        family=family,
        shape=ModelShape.from_hf_config(config.hf_text_config),
        layers=layers,
        final_norm=_norm(inner.norm),
        lm_head=head_weight.data,
        vocab_size=config.get_vocab_size(),
        hidden_size=config.get_hidden_size(),
        dtype=config.dtype,
        device=head_weight.device,
    )


def _decoder_layer(index: int, layer: Any, kv_group_of: dict[str, int]) -> DecoderLayer:
    attention, mlp = layer.self_attn, layer.mlp
    if getattr(attention, "do_llama_4_scaling", False):
        raise ValueError("attention with Llama-4 query scaling cannot be co-finetuned")
    rope = attention.rotary_emb
    if not rope.is_neox_style:
        raise ValueError("rotary embeddings that are not of NeoX style cannot be co-finetuned")
    core = attention.attn
    heads, kv_heads, dim = attention.num_heads, attention.num_kv_heads, attention.head_dim
    prefix = f"model.layers.{index}"
    gate_up = mlp.gate_up_proj
    width = gate_up.output_slices[0]
    geometry = AttentionGeometry(
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=dim,
        scale=attention.scaling,
        sliding_window=core.sliding_window,
        cos_sin_cache=rope.cos_sin_cache.data,
        kv_group=kv_group_of[core.layer_name],
        read_kv=kv_reader_for(core),
        block_size=_kv_block_size(core),
        kv_pages=kv_pages_for(core),
    )
    q_norm, k_norm = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
    return DecoderLayer(
        index=index,
        input_norm=_norm(layer.input_layernorm),
        qkv_proj=_linear(
            f"{prefix}.self_attn.qkv_proj",
            attention.qkv_proj,
            (heads * dim, kv_heads * dim, kv_heads * dim),
        ),
        q_norm=_norm(q_norm) if q_norm is not None else None,
        k_norm=_norm(k_norm) if k_norm is not None else None,
        attention=geometry,
        o_proj=_linear(f"{prefix}.self_attn.o_proj", attention.o_proj),
        post_norm=_norm(layer.post_attention_layernorm),
        gate_up_proj=_linear(f"{prefix}.mlp.gate_up_proj", gate_up, (width, width)),
        down_proj=_linear(f"{prefix}.mlp.down_proj", mlp.down_proj),
    )


def _linear(name: str, module: Any, splits: tuple[int, ...] | None = None) -> FrozenLinear:
    """`module` is vLLM's LoRA wrapper around the base linear."""
    base = module.base_layer
    apply: Callable[[Tensor], Tensor] = lambda x: base.quant_method.apply(base, x, base.bias)  # noqa: E731
    return FrozenLinear(
        name=name,
        apply=apply,
        input_grad=input_grad_of(base),
        dtype=base.params_dtype,
        in_features=module.input_size,
        splits=splits or (base.output_size,),
        module=module,
    )


def _norm(module: Any) -> RMSNorm:
    return RMSNorm(weight=module.weight.data, eps=module.variance_epsilon, module=module)


def _kv_block_size(attention: Any) -> int:
    cache: torch.Tensor = attention.kv_cache
    return cache.shape[2]
