"""The memory plan of a job: what each layer keeps, in bytes, before anything is allocated."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from vllm_flexft.graph.families import family_of, layer_graph
from vllm_flexft.graph.ops import CACHED, LayerGraph, ModelShape
from vllm_flexft.graph.policy import KeepChoice, Policy, choose, frontier
from vllm_flexft.graph.prune import LayerNeeds, prune


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """What the forward leaves behind for the backward, layer by layer.

    Attributes:
        graph: of one decoder layer; all layers are alike.
        lowest_layer: layers below it hold no adapter: their backward is dropped whole.
        needs: layer -> what its backward reads, for layers `lowest_layer` and up.
        kept: layer -> the choice that was made for it.
        itemsize: bytes of a number.
    """

    graph: LayerGraph
    lowest_layer: int
    needs: dict[int, LayerNeeds]
    kept: dict[int, KeepChoice]
    final_numbers: int  # of the final norm's input, a token
    itemsize: int

    @property
    def bytes_per_token(self) -> int:
        numbers = sum(choice.numbers for choice in self.kept.values())
        return (numbers + self.final_numbers) * self.itemsize

    @property
    def recompute_flops(self) -> float:
        """A token, over all layers: what the backward computes again."""
        return sum(choice.flops for choice in self.kept.values())

    def bytes_by_tensor(self) -> dict[str, int]:
        """A token; the final norm's input stands as `final_residual`."""
        total = dict.fromkeys(self.graph.widths, 0)
        for choice in self.kept.values():
            for name in choice.kept:
                total[name] += self.graph.widths[name] * self.itemsize
        total["final_residual"] = self.final_numbers * self.itemsize
        return total


def plan_memory(
    shape: ModelShape,
    *,
    targets: Collection[str],
    layers: Sequence[int],
    tokens: int,
    context: int,
    itemsize: int,
    memory_bytes: float,
    other_bytes: float = 0.0,
    policy: Policy = "auto",
) -> MemoryPlan:
    """Prune, then choose what to keep for `tokens` tokens under a budget.

    Args:
        targets: PEFT names of the adapted linears.
        layers: indices of the layers that carry them.
        context: tokens of a sequence, for the cost of recomputing attention.
        memory_bytes: the budget.
        other_bytes: what training takes of it besides activations.

    Raises:
        ValueError: not even the least that can be kept fits; names the budget that would do.
    """
    graph = layer_graph(family_of(shape.architecture), shape, context)
    lowest = min(layers)
    needs = {
        index: prune(graph, targets if index in layers else (), below=index > lowest)
        for index in range(lowest, shape.num_layers)
    }
    # Layers with the same needs share a frontier: compute each once.
    frontiers: dict[frozenset[str], tuple[KeepChoice, ...]] = {}
    for need in needs.values():
        if need.tensors not in frontiers:
            frontiers[need.tensors] = frontier(graph, need)
    per_layer = [frontiers[need.tensors] for need in needs.values()]
    final = shape.hidden_size
    budget = (memory_bytes - other_bytes) / itemsize / tokens - final
    picked = choose(per_layer, policy, budget)
    if picked is None:
        index = -1 if policy == "fast" else 0
        numbers = sum(options[index].numbers for options in per_layer) + final
        gib = (numbers * itemsize * tokens + other_bytes) / 2**30
        enough = math.ceil(gib * 1000) / 1000
        remedy = f"give it memory_gib {enough:g}, or lower dataset.max_length"
        if policy == "fast":
            remedy += ", or set activation_policy to auto"
        raise ValueError(
            f"training needs {gib:.3f} GiB of memory for {tokens} tokens in flight and has "
            f"{memory_bytes / 2**30:.3f} GiB; {remedy}"
        )
    kept = dict(zip(needs, picked, strict=True))
    return MemoryPlan(graph, lowest, needs, kept, final, itemsize)


def reduction(plan: MemoryPlan, num_layers: int) -> list[tuple[str, int]]:
    """Bytes a token that each step of the analysis leaves, from everything that the forward makes
    to the least that can be kept."""
    graph, needs = plan.graph, plan.needs.values()
    made = sum(graph.sizes[op.output] for op in graph.ops) + graph.sizes["k"]  # rope: q and k
    read = sum(graph.sizes[name] for need in needs for name in need.tensors)
    uncached = sum(graph.sizes[name] for need in needs for name in need.tensors - CACHED)
    ends: dict[frozenset[str], tuple[KeepChoice, ...]] = {}
    for need in needs:
        if need.tensors not in ends:
            ends[need.tensors] = frontier(graph, need)
    steps = [
        ("made by the forward", num_layers * made),
        ("pruned: read by some backward", read),
        ("keys, values left in the KV cache", uncached),
        ("norms, activation formed again", sum(ends[need.tensors][-1].numbers for need in needs)),
        ("least: all formed again", sum(ends[need.tensors][0].numbers for need in needs)),
    ]
    return [(name, (numbers + plan.final_numbers) * plan.itemsize) for name, numbers in steps]


def adapter_parameters(
    shape: ModelShape, targets: Collection[str], layers: Collection[int], rank: int
) -> int:
    """Numbers in A and B of all adapted linears."""
    per_layer = sum(rank * sum(shape.linear_shapes[name]) for name in targets)
    return per_layer * len(layers)


def training_state_bytes(parameters: int, optim: str) -> int:
    """fp32 masters, gradients and (AdamW) two moments."""
    return parameters * 4 * (4 if optim == "adamw_torch" else 2)


def working_bytes(
    shape: ModelShape, lane_tokens: int, num_lanes: int, logits_rows: int, itemsize: int
) -> int:
    """Of the backward (train/working.py): a lane's residual-stream gradient in fp32, of one layer
    the keys and values read back with their fp32 gradients, and the logits of a few rows."""
    keys = 2 * shape.num_kv_heads * shape.head_dim
    a_token = num_lanes * 4 * shape.hidden_size + (itemsize + 4) * keys
    return lane_tokens * a_token + logits_rows * shape.vocab_size * itemsize
