from __future__ import annotations

from types import SimpleNamespace

import pytest

from vllm_flexft.graph.ops import ModelShape
from vllm_flexft.sched.costs import BACKWARD_RATIO, CPU_FLOPS, UnitCosts
from vllm_flexft.sched.latency import Feature

LLAMA_8B = ModelShape.from_hf_config(
    SimpleNamespace(
        architectures=["LlamaForCausalLM"], num_hidden_layers=32, hidden_size=4096,
        num_attention_heads=32, num_key_value_heads=8, head_dim=128, intermediate_size=14336,
        vocab_size=128256,
    )
)  # fmt: skip
UNITS = UnitCosts.of(LLAMA_8B).units()


def test_a_token_costs_two_flop_a_parameter():
    # 8.03e9 parameters less embeddings and head (2 x 525 M), norms aside
    costs = UnitCosts.of(LLAMA_8B)
    assert costs.token_flops == 2 * 32 * 218_103_808
    assert costs.prior("cpu")[Feature.CHUNK] == pytest.approx(costs.token_flops / CPU_FLOPS)


def test_a_token_through_all_layers_backward_costs_the_ratio():
    assert 32 * UNITS[Feature.LAYER] == pytest.approx(BACKWARD_RATIO)


def test_a_row_of_the_loss_costs_two_products_with_the_head():
    assert UNITS[Feature.LOSS] == pytest.approx(2 * 128256 * 4096 / (32 * 218_103_808))


def test_attending_as_many_keys_as_a_layer_has_parameters_by_width_costs_a_token():
    """scores and values: 4 FLOP a key and number of the query, in each layer"""
    keys = 218_103_808 / (2 * 32 * 128)
    assert keys * UNITS[Feature.CONTEXT] == pytest.approx(1.0)


def test_every_feature_has_a_price():
    for device in ("cpu", "cuda"):
        assert (UnitCosts.of(LLAMA_8B).prior(device) > 0).all()
