"""Activation memory: what is kept under a budget, how many bytes it takes, and the refusal."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch
from harness.gradients import Case, Row
from harness.peft_reference import PeftTrainer, write_rows

from vllm_flexft.train.activations import (
    ActivationStore,
    bytes_per_token,
    choose_stored,
    tensor_widths,
)

EVERYTHING = {"residual_in", "qkv", "attention", "residual_mid", "gate_up"}


@pytest.mark.parametrize("recomputed", [set(), {"gate_up"}, {"gate_up", "qkv"}])
@pytest.mark.parametrize("lowest_layer", [0, 1, 2])
@pytest.mark.parametrize(("family", "dtype"), [("qwen3", "float32"), ("llama", "bfloat16")])
def test_bytes_a_token_are_those_of_the_tensors(family, dtype, lowest_layer, recomputed, bench):
    model = bench(family, dtype).served_model()
    stored = tuple(EVERYTHING - recomputed)
    store = ActivationStore(model, lowest_layer, stored, lane_tokens=10, num_lanes=2)
    real = sum(tensor.nbytes for lane in store.lanes for tensor in lane.values())
    assert real == 2 * 10 * bytes_per_token(model, lowest_layer, stored)


def test_widths_are_those_that_the_capture_fills(bench):
    """Qwen3's heads are wider than its hidden size, and its backward reads keys before the norm."""
    widths = tensor_widths(bench("qwen3").served_model())
    hidden, heads, kv_heads, head_dim, mlp = 96, 4, 1, 32, 256
    assert widths == {
        "residual_in": hidden,
        "qkv": (heads + kv_heads) * head_dim,
        "attention": heads * head_dim,
        "residual_mid": hidden,
        "gate_up": 2 * mlp,
    }


def test_a_smaller_budget_gives_up_the_cheapest_to_recompute_first(bench):
    model = bench("llama").served_model()
    everything = bytes_per_token(model, 0, EVERYTHING)
    without_mlp = bytes_per_token(model, 0, EVERYTHING - {"gate_up"})
    assert set(choose_stored(model, 0, 7, 7 * everything)) == EVERYTHING
    assert set(choose_stored(model, 0, 7, 7 * everything - 1)) == EVERYTHING - {"gate_up"}
    assert set(choose_stored(model, 0, 7, 7 * without_mlp - 1)) == EVERYTHING - {"gate_up", "qkv"}


def test_refusal_names_a_budget_that_would_do(bench):
    model = bench("llama").served_model()
    with pytest.raises(ValueError, match="raise memory_gib") as refusal:
        choose_stored(model, 0, 333, 1000.0)
    (needed,) = re.findall(r"need ([0-9.]+) GiB", str(refusal.value))
    assert choose_stored(model, 0, 333, float(needed) * 2**30)


def test_a_job_refused_for_memory_trains_with_the_memory_gib_that_the_refusal_names(
    bench, tmp_path, monkeypatch
):
    bench = bench("llama")
    runner, config = bench.runner, bench.runner._co_serve
    case = Case((Row(0, 200, 200),), targets=("q_proj",))
    dataset = write_rows(tmp_path / "rows.jsonl", [row.text() for row in case.rows])
    adapter = PeftTrainer(bench.model, case.peft()).save(tmp_path / "init")

    def serve_with(memory_gib: float) -> None:
        options = config.options.model_copy(update={"memory_gib": memory_gib})
        monkeypatch.setattr(runner, "_co_serve", dataclasses.replace(config, options=options))

    serve_with(1e-6)
    with pytest.raises(AssertionError, match="raise memory_gib") as failure:
        bench.train(case, adapter, dataset)
    (needed,) = re.findall(r"need ([0-9.]+) GiB", str(failure.value))
    serve_with(float(needed))
    assert torch.isfinite(torch.tensor(bench.train(case, adapter, dataset).loss))
