"""Static pruning of a layer's backward."""

from __future__ import annotations

import itertools

import pytest

from vllm_flexft.graph.families import FAMILIES, TARGETS, layer_graph
from vllm_flexft.graph.ops import CACHED, LayerGraph, ModelShape
from vllm_flexft.graph.prune import prune

SHAPE = ModelShape("LlamaForCausalLM", 4, 64, 4, 2, 16, 96, 512, False)
SUBSETS = [
    subset for size in range(1, 8) for subset in itertools.combinations(sorted(TARGETS), size)
]


def graph(architecture: str = "LlamaForCausalLM") -> LayerGraph:
    return layer_graph(FAMILIES[architecture], SHAPE, context=128)


def test_layer_without_adapters_above_no_other_costs_nothing():
    needs = prune(graph(), (), below=False)
    assert needs.backward_ops == ()
    assert needs.tensors == frozenset()


def test_down_proj_of_the_lowest_layer_reads_only_its_input():
    needs = prune(graph(), ("down_proj",), below=False)
    assert needs.backward_ops == ("add_mlp", "down_proj")
    assert needs.tensors == {"act"}


def test_attention_is_pruned_where_only_the_mlp_of_the_lowest_layer_is_trained():
    needs = prune(graph(), ("gate_proj", "down_proj"), below=False)
    assert "attention" not in needs.backward_ops


def test_output_of_attention_is_read_only_by_an_adapter_on_o_proj():
    for subset in SUBSETS:
        needs = prune(graph(), subset, below=True)
        assert ("attention" in needs.tensors) == ("o_proj" in subset)


def test_projections_before_the_norms_are_read_only_with_qk_norm():
    assert "qkv" in prune(graph("Qwen3ForCausalLM"), ("q_proj",), below=True).tensors
    assert "qkv" not in prune(graph(), ("q_proj",), below=True).tensors


@pytest.mark.parametrize("below", [False, True])
@pytest.mark.parametrize("architecture", sorted(FAMILIES))
def test_every_read_tensor_has_a_reader_whose_backward_runs(architecture, below):
    layer = graph(architecture)
    for subset in SUBSETS:
        needs = prune(layer, subset, below)
        for tensor, readers in needs.reads.items():
            assert readers, tensor
            assert set(readers) <= set(needs.backward_ops)
            assert tensor in {layer.input, *layer.producers, *CACHED}


def test_more_adapters_never_need_less():
    layer = graph()
    for subset in SUBSETS:
        needs = prune(layer, subset, below=False).tensors
        for name in subset:
            fewer = tuple(other for other in subset if other != name)
            assert prune(layer, fewer, below=False).tensors <= needs
