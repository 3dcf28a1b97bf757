"""Keep or recompute, against brute force."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_flexft.graph.families import FAMILIES, TARGETS, layer_graph
from vllm_flexft.graph.ops import CACHED, ModelShape
from vllm_flexft.graph.policy import KeepChoice, choose, frontier, recompute_flops
from vllm_flexft.graph.prune import prune

SHAPE = ModelShape("LlamaForCausalLM", 4, 64, 4, 2, 16, 96, 512, False)
targets = st.sets(st.sampled_from(sorted(TARGETS)), min_size=1).map(tuple)


def layer(architecture: str, names: tuple[str, ...], below: bool):
    graph = layer_graph(FAMILIES[architecture], SHAPE, context=128)
    return graph, prune(graph, names, below)


@settings(derandomize=True, deadline=None, max_examples=60)
@given(st.sampled_from(sorted(FAMILIES)), targets, st.booleans())
def test_removing_a_kept_tensor_costs_recomputation_or_makes_the_backward_impossible(
    architecture, names, below
):
    graph, needs = layer(architecture, names, below)
    for choice in frontier(graph, needs):
        for tensor in choice.kept:
            rest = frozenset(choice.kept) - {tensor}
            flops = recompute_flops(graph, needs.tensors, rest)
            assert flops is None or flops > choice.flops


@settings(derandomize=True, deadline=None, max_examples=60)
@given(st.sampled_from(sorted(FAMILIES)), targets, st.booleans())
def test_no_set_of_tensors_beats_the_frontier(architecture, names, below):
    graph, needs = layer(architecture, names, below)
    best = frontier(graph, needs)
    for size in range(len(graph.widths) + 1):
        for kept in itertools.combinations(graph.widths, size):
            flops = recompute_flops(graph, needs.tensors, frozenset(kept))
            numbers = sum(graph.widths[name] for name in kept)
            if flops is not None:
                assert any(c.numbers <= numbers and c.flops <= flops for c in best), kept


def test_keys_and_values_are_never_kept():
    graph, needs = layer("LlamaForCausalLM", tuple(TARGETS), True)
    assert needs.tensors >= CACHED
    assert not any(CACHED & set(choice.kept) for choice in frontier(graph, needs))


def _frontier_of(pairs: list[tuple[int, int]]) -> list[KeepChoice]:
    return [
        KeepChoice((), numbers, float(flops))
        for numbers, flops in sorted(pairs)
        if not any(n <= numbers and f <= flops for n, f in pairs if (n, f) != (numbers, flops))
    ]


options = st.lists(
    st.tuples(st.integers(0, 20), st.integers(0, 20)), min_size=1, max_size=4, unique=True
).map(_frontier_of)


@settings(derandomize=True, deadline=None, max_examples=100)
@given(st.lists(options, min_size=1, max_size=5), st.integers(0, 80))
def test_choice_over_layers_is_the_best_one_under_the_budget(layers, budget):
    picked = choose(layers, "auto", budget)
    every = [
        (sum(c.numbers for c in combination), sum(c.flops for c in combination))
        for combination in itertools.product(*layers)
    ]
    possible = [flops for numbers, flops in every if numbers <= budget]
    if picked is None:
        assert not possible
    else:
        assert sum(choice.numbers for choice in picked) <= budget
        assert sum(choice.flops for choice in picked) == min(possible)


@pytest.mark.parametrize(("policy", "index"), [("minimal", 0), ("fast", -1)])
def test_policy_takes_that_end_of_the_frontier(policy, index):
    graph, needs = layer("LlamaForCausalLM", tuple(TARGETS), True)
    ends = frontier(graph, needs)
    assert choose([ends] * 3, policy, float("inf")) == (ends[index],) * 3
