"""Families, target modules and layers: what is taken, and what is refused in which words."""

from __future__ import annotations

import pytest

from vllm_flexft.config.peft import LINEAR_MODULES
from vllm_flexft.graph.families import (
    FAMILIES,
    TARGETS,
    family_of,
    target_layers,
    target_names,
)


def test_the_four_families_are_supported():
    assert set(FAMILIES) == {
        "LlamaForCausalLM",
        "MistralForCausalLM",
        "Qwen2ForCausalLM",
        "Qwen3ForCausalLM",
    }


def test_only_qwen3_norms_queries_and_keys():
    assert [name for name in FAMILIES if family_of(name).qk_norm] == ["Qwen3ForCausalLM"]


def test_another_architecture_is_refused_with_the_list_of_those_supported():
    with pytest.raises(ValueError, match="Gemma3ForCausalLM cannot be co-finetuned") as refusal:
        family_of("Gemma3ForCausalLM")
    assert all(name in str(refusal.value) for name in FAMILIES)


def test_targets_are_the_seven_linears_that_a_job_may_name():
    assert tuple(TARGETS) == LINEAR_MODULES


def test_targets_are_where_peft_and_vllm_have_them():
    """PEFT names the module by transformers' attribute path, vLLM packs q, k, v and gate, up."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer
    from vllm.model_executor.models.llama import LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=8, intermediate_size=8, num_attention_heads=2, num_key_value_heads=2
    )
    layer = LlamaDecoderLayer(config, 0)
    packed = LlamaForCausalLM.packed_modules_mapping
    for name, (vllm_name, part, parent) in TARGETS.items():
        assert hasattr(getattr(layer, parent), name)
        if vllm_name in packed:
            assert packed[vllm_name][part] == name
        else:
            assert (vllm_name, part) == (name, 0)


@pytest.mark.parametrize("given", [("v_proj", "q_proj"), ["v_proj", "q_proj", "q_proj"]])
def test_target_names_come_in_the_order_a_layer_runs_them(given):
    assert target_names(given) == ("q_proj", "v_proj")


def test_all_linear_means_the_seven():
    assert target_names("all-linear") == LINEAR_MODULES


@pytest.mark.parametrize(
    ("given", "expected"),
    [(None, (0, 1, 2, 3)), (2, (2,)), ((3, 1), (1, 3)), ([1, 1], (1,)), (0, (0,))],
)
def test_layers_are_sorted_and_counted_from_zero(given, expected):
    assert target_layers(given, num_layers=4) == expected


@pytest.mark.parametrize("given", [4, (0, 7), [-1], ()])
def test_layers_that_the_model_lacks_are_refused_with_those_it_has(given):
    with pytest.raises(ValueError, match=r"layers_to_transform.*layers 0\.\.3"):
        target_layers(given, num_layers=4)
