"""What a job takes, for models that this machine could not load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from harness.plan_command import LLAMA, Write, run, sized
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, Qwen3Config

from vllm_flexft.cli.plan_text import gib
from vllm_flexft.config.peft import LINEAR_MODULES
from vllm_flexft.graph.job_memory import Lanes
from vllm_flexft.graph.ops import ModelShape


def test_8b_keeps_what_its_dimensions_say(write: Write) -> None:
    """Residual stream twice, q and attention: 4 x 4,096 a layer; gate and up: 28,672. bf16."""
    plan = sized(write())
    per_layer = 4 * 4096 + 2 * 14336
    assert plan.memory.bytes_per_token == 2 * (32 * per_layer + 4096)
    # A row of the loss is two products with the head; 74 of them are 256 rows of a layer back.
    logits = int(256 * 1.4 * 218_103_808 / (2 * 128_256 * 4096)) * 128_256 * 2
    assert plan.working == 1024 * (4 * 4096 + (2 + 4) * 2 * 8 * 128) + logits
    a_layer = 9 * 4096 + 3 * 14336 + 2 * 1024  # inputs and outputs of the seven linears
    assert plan.parameters == 16 * 32 * a_layer == 41_943_040
    assert plan.state == 16 * plan.parameters
    assert plan.kv_per_token == 32 * 2 * 8 * 128 * 2


@pytest.mark.parametrize("size", LLAMA)
def test_least_of_llama_is_the_layers_inputs_and_below_flexllms_15_percent(
    size: str, write: Write
) -> None:
    plan = sized(write(size), policy="minimal")
    hidden, layers = LLAMA[size]["hidden_size"], LLAMA[size]["num_hidden_layers"]
    assert plan.memory.bytes_per_token == 2 * hidden * (layers + 1)
    assert plan.reduction[-1][1] == plan.memory.bytes_per_token
    sizes = [bytes_ for _, bytes_ in plan.reduction]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] < 0.15 * sizes[0]


def test_a_budget_is_filled_and_never_exceeded(write: Write) -> None:
    model = write()
    floor, ceiling = sized(model).floor / 2**30, sized(model).ceiling / 2**30
    for budget in (floor + 1e-6, 1.1, 2.0, 3.0, ceiling, 10.0):
        plan = sized(model, budget_gib=budget)
        assert plan.taken <= budget * 2**30
        assert (plan.memory.recompute_flops == sized(model).memory.recompute_flops) == (
            budget >= ceiling
        )


def test_it_says_what_a_server_takes_between_floor_and_all_that_it_has_use_for(
    write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two lanes of 2,048 tokens, each with the residual stream's gradient; one K, V, dK and dV."""
    model = write()
    plan = sized(model)
    a_token = plan.memory.bytes_per_token
    one_lane = plan.taken - 2048 * (a_token + 4 * 4096)
    logits = plan.working - 1024 * (4 * 4096 + 6 * 2 * 1024)
    assert plan.lanes == Lanes(2, 2048)
    assert plan.taken == plan.most
    assert plan.taken == plan.state + 4096 * (a_token + 4 * 4096) + 2048 * 6 * 2 * 1024 + logits
    steps = ((plan.taken, 2, 2048), (one_lane, 1, 2048), (plan.ceiling, 1, 1024))
    for budget, lanes, tokens in steps:
        enough, less = (sized(model, budget_gib=(budget + x) / 2**30) for x in (0.5, -0.5))
        assert (enough.lanes, enough.taken) == (Lanes(lanes, tokens), budget)
        assert less.taken < budget
    _, text, _ = run(capsys, model, "--rank", "16")
    assert f"takes           {gib(plan.taken)}  (2 lanes of 2,048 tokens)" in text
    assert f"in all          {gib(plan.taken + plan.weights)}" in text
    assert f"from {plan.floor / 2**30:.3f} up" in text
    _, text, _ = run(capsys, model, "--rank", "16", "--memory-gib", "8")
    assert f"takes           {gib(one_lane)}  of 8.000 GiB  (1 lane of 2,048 tokens)" in text


@pytest.mark.parametrize("tied", [False, True])
def test_weights_are_those_of_the_model(tied: bool, write: Write) -> None:
    model = write(tie_word_embeddings=tied)
    with torch.device("meta"):
        made = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model))
    numbers = sum(p.numel() for p in made.parameters())
    assert sized(model).weights == pytest.approx(2 * numbers, rel=1e-3)


def test_the_longest_sequence_fits_and_one_token_more_does_not(write: Write) -> None:
    model = write()
    longest = sized(model, budget_gib=1.5).largest_tokens
    assert longest is not None
    lengths = {"dataset": {"path": "rows.jsonl", "max_length": longest}}
    sized(model, budget_gib=1.5, job=lengths)
    lengths["dataset"]["max_length"] = longest + 1
    with pytest.raises(ValueError, match="memory_gib"):
        sized(model, budget_gib=1.5, job=lengths)


def counted_flops(model: str, tokens: int, peft: dict[str, Any]) -> float:
    """Of a training step of transformers + peft with all scores formed, as torch counts them."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(
        AutoConfig.from_pretrained(model), attn_implementation="eager"
    )
    trained = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **peft))
    ids = torch.arange(tokens)[None]
    with FlopCounterMode(display=False) as counter:
        trained(input_ids=ids, labels=ids).loss.backward()
    return counter.get_total_flops()


@pytest.mark.parametrize(
    "peft",
    [
        {"r": 4, "target_modules": list(LINEAR_MODULES)},
        {"r": 4, "target_modules": ["q_proj", "k_proj", "v_proj"]},
        {"r": 4, "target_modules": ["down_proj"], "layers_to_transform": [1, 2]},
    ],
    ids=["all-linear", "q, k, v", "upper down_proj"],
)
def test_work_is_that_of_transformers_and_peft_at_every_length(
    peft: dict[str, Any], tmp_path: Path
) -> None:
    """What grows with the square of the length is attention: of it the engine leaves out the half
    above the diagonal, and forms the scores again: 7 products where autograd has 6."""
    LlamaConfig(
        architectures=["LlamaForCausalLM"], hidden_size=64, intermediate_size=160, vocab_size=512,
        num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, dtype="float32",
    ).save_pretrained(tmp_path)  # fmt: skip
    model = str(tmp_path)
    short, long = (counted_flops(model, tokens, peft) for tokens in (128, 256))
    squared = (long / 256 - short / 128) / 128
    linear = short / 128 - squared * 128
    forward = 3 * 4 * 64  # scores and their product with V, 2 FLOP a head's number, in 3 layers
    ours = forward / 2 + (squared - forward) / 2 * 5 / 4
    for tokens in (128, 256, 500):
        lengths = {"path": "rows.jsonl", "max_length": tokens}
        job = {"peft": peft, "dataset": lengths}
        work = sized(model, dtype="float32", job=job).work
        expected = linear + ours * tokens
        assert work.total - work.recomputed == pytest.approx(expected, rel=0.01)


def test_attention_slows_long_sequences_down(write: Write) -> None:
    model = write()
    work = [
        sized(model, job={"dataset": {"path": "rows.jsonl", "max_length": n}}).work.total
        for n in (1024, 131_072)
    ]
    # 7 products of 4,096 numbers with half of the keys, in 32 layers
    assert work[1] - work[0] == pytest.approx(7 * 4096 * (131_072 - 1024) * 32, rel=1e-6)
    assert work[1] > 4 * work[0]


def test_profile_measures_a_gemm_of_the_model(write: Write) -> None:
    from vllm_flexft.cli.sizing import measured_flops

    shape = ModelShape.from_hf_config(AutoConfig.from_pretrained(write()))
    assert 1e8 < measured_flops(shape, "float32", seconds=0.05) < 1e16


def test_no_sequence_is_longer_than_the_models_positions(
    write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    _, text, _ = run(capsys, write(), "--memory-gib", "100")
    assert "longest sequence that fits: 131,072 tokens" in text


def test_qwen3_keeps_keys_before_their_norm(tmp_path: Path) -> None:
    config = Qwen3Config(
        architectures=["Qwen3ForCausalLM"], dtype="bfloat16", hidden_size=1024, head_dim=128,
        num_attention_heads=16, num_key_value_heads=8, num_hidden_layers=28, intermediate_size=3072,
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    by_tensor = sized(str(tmp_path)).memory.bytes_by_tensor()
    assert by_tensor["qkv"] == 28 * 2 * (16 + 8) * 128
