"""What the supported decoder families have in common, and where they differ.

Every family here is a pre-norm decoder of the Llama shape:

    x1 = x0 + o_proj(attention(rope([qk_norm](qkv_proj(norm(x0))))))
    x2 = x1 + down_proj(silu(gate) * up),  [gate, up] = gate_up_proj(norm(x1))

A family states only its differences; the module names are vLLM's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vllm_flexft.graph.ops import LayerGraph, ModelShape, Op

# PEFT's module names -> (vLLM's packed module, index of its slice there, PEFT's parent module).
TARGETS: dict[str, tuple[str, int, str]] = {
    "q_proj": ("qkv_proj", 0, "self_attn"),
    "k_proj": ("qkv_proj", 1, "self_attn"),
    "v_proj": ("qkv_proj", 2, "self_attn"),
    "o_proj": ("o_proj", 0, "self_attn"),
    "gate_proj": ("gate_up_proj", 0, "mlp"),
    "up_proj": ("gate_up_proj", 1, "mlp"),
    "down_proj": ("down_proj", 0, "mlp"),
}


@dataclass(frozen=True, slots=True)
class Family:
    architecture: str
    qk_norm: bool = False


FAMILIES: dict[str, Family] = {
    family.architecture: family
    for family in (
        Family("LlamaForCausalLM"),
        Family("MistralForCausalLM"),
        Family("Qwen2ForCausalLM"),
        Family("Qwen3ForCausalLM", qk_norm=True),
    )
}


def layer_graph(family: Family, shape: ModelShape, context: int) -> LayerGraph:
    """One decoder layer of the family. `context`: keys a query attends to, for FLOP only.

    With qk-norm the backward of the norms reads the projections before them; without it, only the
    queries as attention sees them, which rope gives from the projections at no cost worth counting.
    """
    hidden, mlp = shape.hidden_size, shape.intermediate_size
    query, key = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    norm_reads = ("qkv",) if family.qk_norm else ()
    ops = (
        Op("input_norm", ("residual_in",), "h_attention", 4.0 * hidden, reads=("residual_in",)),
        Op(
            "qkv_proj",
            ("h_attention",),
            "qkv",
            2.0 * hidden * (query + 2 * key),
            bypass_reads=("h_attention",),
            targets=("q_proj", "k_proj", "v_proj"),
        ),
        Op("rope", ("qkv",), "q", 4.0 * query, reads=norm_reads),
        Op(
            "attention",
            ("q", "k", "v"),
            "attention",
            4.0 * query * context / 2,
            reads=("q", "k", "v"),
        ),
        Op(
            "o_proj",
            ("attention",),
            "attention_out",
            2.0 * query * hidden,
            bypass_reads=("attention",),
            targets=("o_proj",),
        ),
        Op("add_attention", ("residual_in", "attention_out"), "residual_mid", hidden),
        Op("post_norm", ("residual_mid",), "h_mlp", 4.0 * hidden, reads=("residual_mid",)),
        Op(
            "gate_up_proj",
            ("h_mlp",),
            "gate_up",
            4.0 * hidden * mlp,
            bypass_reads=("h_mlp",),
            targets=("gate_proj", "up_proj"),
        ),
        Op("silu_mul", ("gate_up",), "act", 6.0 * mlp, reads=("gate_up",)),
        Op(
            "down_proj",
            ("act",),
            "mlp_out",
            2.0 * mlp * hidden,
            bypass_reads=("act",),
            targets=("down_proj",),
        ),
        Op("add_mlp", ("residual_mid", "mlp_out"), "residual_out", hidden),
    )
    sizes = {
        "residual_in": hidden,
        "h_attention": hidden,
        "qkv": query + 2 * key,
        "q": query,
        "k": key,
        "v": key,
        "attention": query,
        "attention_out": hidden,
        "residual_mid": hidden,
        "h_mlp": hidden,
        "gate_up": 2 * mlp,
        "act": mlp,
        "mlp_out": hidden,
        "residual_out": hidden,
    }
    widths = {
        "residual_in": hidden,
        "qkv": query + key if family.qk_norm else query,
        "attention": query,
        "residual_mid": hidden,
        "gate_up": 2 * mlp,
    }
    return LayerGraph(ops, sizes, widths)


def family_of(architecture: str) -> Family:
    """Raises ValueError for an architecture that is not supported."""
    if architecture not in FAMILIES:
        raise ValueError(
            f"model architecture {architecture} cannot be co-finetuned; "
            f"supported: {', '.join(sorted(FAMILIES))}"
        )
    return FAMILIES[architecture]


def target_names(target_modules: str | Sequence[str]) -> tuple[str, ...]:
    """The seven linears for "all-linear", otherwise the given ones in canonical order."""
    if target_modules == "all-linear":
        return tuple(TARGETS)
    return tuple(name for name in TARGETS if name in target_modules)


def target_layers(
    layers_to_transform: int | Sequence[int] | None, num_layers: int
) -> tuple[int, ...]:
    """Layer indices that carry an adapter; raises ValueError for one the model lacks."""
    if layers_to_transform is None:
        return tuple(range(num_layers))
    layers = [layers_to_transform] if isinstance(layers_to_transform, int) else layers_to_transform
    bad = [layer for layer in layers if not 0 <= layer < num_layers]
    if bad or not layers:
        raise ValueError(
            f"peft.layers_to_transform: {layers} but the model has layers 0..{num_layers - 1}"
        )
    return tuple(sorted(set(layers)))
