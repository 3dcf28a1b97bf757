from __future__ import annotations

from types import SimpleNamespace

from vllm_flexft.sched.costs import BACKWARD_RATIO, UnitCosts

LLAMA_8B = SimpleNamespace(
    num_hidden_layers=32, hidden_size=4096, num_attention_heads=32, num_key_value_heads=8,
    head_dim=128, intermediate_size=14336, vocab_size=128256,
)  # fmt: skip


def test_layer_parameters_are_those_of_llama_8b():
    # 8.03e9 parameters less embeddings (2 x 525 M) over 32 layers, norms aside
    assert UnitCosts.from_hf_config(LLAMA_8B).layer_parameters == 218_103_808


def test_a_token_through_all_layers_backward_costs_the_ratio():
    costs = UnitCosts.from_hf_config(LLAMA_8B)
    assert abs(32 * costs.layer_slice(1) - BACKWARD_RATIO) < 1e-12


def test_the_loss_costs_two_products_with_the_head():
    costs = UnitCosts.from_hf_config(LLAMA_8B)
    assert abs(costs.loss_slice(256) - 256 * 2 * 128256 * 4096 / (32 * 218_103_808)) < 1e-9


def test_missing_optional_fields_mean_multi_head_attention():
    config = SimpleNamespace(
        num_hidden_layers=2, hidden_size=64, num_attention_heads=4, intermediate_size=96,
        vocab_size=100,
    )  # fmt: skip
    assert UnitCosts.from_hf_config(config).layer_parameters == 4 * 64 * 64 + 3 * 64 * 96
