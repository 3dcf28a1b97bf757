"""Keep or recompute: the least recomputation under a byte budget.

Per layer the choices are few (at most 2^5 sets of tensors to keep), so all are enumerated and the
Pareto frontier of (bytes, FLOP to recompute) is exact. Across layers the frontiers are added up by
dynamic programming that drops dominated sums: exact as long as there are at most `MAX_STATES` of
them, and thinned evenly beyond that. Within an optimizer step every token is recomputed at most
once, as in Checkmate (Jain et al. 2020, arXiv 1910.02653) with one recomputation a tensor.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from vllm_flexft.graph.ops import CACHED, LayerGraph
from vllm_flexft.graph.prune import LayerNeeds

Policy = Literal["auto", "fast", "minimal"]
MAX_STATES = 1024


@dataclass(frozen=True, slots=True)
class KeepChoice:
    """Tensors of one layer to keep, in the order of the forward.

    Attributes:
        numbers: a token, over the kept tensors.
        flops: a token, to recompute what the backward reads and is not kept.
    """

    kept: tuple[str, ...]
    numbers: int
    flops: float


def frontier(graph: LayerGraph, needs: LayerNeeds) -> tuple[KeepChoice, ...]:
    """Choices that no other one beats in both bytes and FLOP, fewest bytes first.

    A kept tensor that no backward reads, itself or through recomputation, never survives: leaving
    it out has the same FLOP and fewer bytes.
    """
    choices = []
    candidates = tuple(graph.widths)
    for size in range(len(candidates) + 1):
        for kept in itertools.combinations(candidates, size):
            flops = recompute_flops(graph, needs.tensors, frozenset(kept))
            if flops is not None:
                numbers = sum(graph.widths[name] for name in kept)
                choices.append(KeepChoice(kept, numbers, flops))
    return tuple(_undominated(choices))


def recompute_flops(
    graph: LayerGraph, tensors: Iterable[str], kept: frozenset[str]
) -> float | None:
    """FLOP a token to have all of `tensors`; shared steps count once. None if impossible."""
    formed: set[str] = set()
    total, wanted = 0.0, list(tensors)
    while wanted:
        tensor = wanted.pop()
        if tensor in kept or tensor in CACHED or tensor in formed:
            continue
        op = graph.producers.get(tensor)
        if op is None:
            return None
        formed.add(tensor)
        total += op.flops
        wanted.extend(op.inputs)
    return total


def choose(
    frontiers: Sequence[Sequence[KeepChoice]], policy: Policy, budget: float
) -> tuple[KeepChoice, ...] | None:
    """One choice a layer: `fast` recomputes least whatever it takes, `minimal` keeps least, `auto`
    recomputes least within `budget` numbers a token. None if even the least exceeds the budget."""
    least = tuple(layer[0] for layer in frontiers)
    if sum(choice.numbers for choice in least) > budget:
        return None
    if policy == "minimal":
        return least
    most = tuple(layer[-1] for layer in frontiers)
    if sum(choice.numbers for choice in most) <= budget:
        return most
    if policy == "fast":
        return None
    return _best_within(frontiers, budget)


def _best_within(
    frontiers: Sequence[Sequence[KeepChoice]], budget: float
) -> tuple[KeepChoice, ...]:
    """Dynamic programming over the layers; a state is (numbers, flops, choices so far)."""
    states: list[tuple[int, float, tuple[int, ...]]] = [(0, 0.0, ())]
    ahead = [sum(layer[0].numbers for layer in frontiers[i + 1 :]) for i in range(len(frontiers))]
    for layer, least_ahead in zip(frontiers, ahead, strict=True):
        sums = [
            (numbers + choice.numbers, flops + choice.flops, (*picked, index))
            for numbers, flops, picked in states
            for index, choice in enumerate(layer)
            if numbers + choice.numbers + least_ahead <= budget
        ]
        sums.sort(key=lambda state: state[:2])
        states = []
        for state in sums:
            if not states or state[1] < states[-1][1]:
                states.append(state)
        if len(states) > MAX_STATES:
            step = len(states) / MAX_STATES
            states = [states[int(i * step)] for i in range(MAX_STATES)] + [states[-1]]
    best = min(states, key=lambda state: state[1])
    return tuple(layer[index] for layer, index in zip(frontiers, best[2], strict=True))


def _undominated(choices: Sequence[KeepChoice]) -> list[KeepChoice]:
    """The Pareto frontier, fewest numbers first."""
    best: list[KeepChoice] = []
    for choice in sorted(choices, key=lambda c: (c.numbers, c.flops, len(c.kept))):
        if not best or choice.flops < best[-1].flops:
            best.append(choice)
    return best
