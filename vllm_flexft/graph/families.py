"""What the supported decoder families have in common, and where they differ.

Every family here is a pre-norm decoder of the Llama shape:

    x1 = x0 + o_proj(attention(rope([qk_norm](qkv_proj(norm(x0))))))
    x2 = x1 + down_proj(silu(gate) * up),  [gate, up] = gate_up_proj(norm(x1))

A family states only its differences; the module names are vLLM's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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
