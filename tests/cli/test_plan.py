"""`flexft plan`: figures for models that this machine could not load, and each refusal."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, Qwen3Config

from vllm_flexft.cli.main import main
from vllm_flexft.cli.plan_data import DataPlan
from vllm_flexft.cli.plan_text import gib, two_digits
from vllm_flexft.cli.sizing import JobPlan, plan_job
from vllm_flexft.config import FinetuneJob
from vllm_flexft.config.peft import LINEAR_MODULES
from vllm_flexft.data.dataset import DataReport
from vllm_flexft.graph.job_memory import Lanes
from vllm_flexft.graph.ops import ModelShape

DOCS = Path(__file__).parents[2] / "docs/memory.md"
# The published configs of Llama-3.1.
LLAMA: dict[str, dict[str, int]] = {
    "8B": dict(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
    ),
    "70B": dict(
        hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64,
    ),
}  # fmt: skip
Write = Callable[..., str]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """A folder with the config of a Llama-3.1 and nothing else."""

    def make(size: str = "8B", **changes: Any) -> str:
        config = LlamaConfig(
            **LLAMA[size], architectures=["LlamaForCausalLM"], dtype="bfloat16", vocab_size=128_256,
            num_key_value_heads=8, max_position_embeddings=131_072,
        )  # fmt: skip
        for name, value in changes.items():
            setattr(config, name, value)
        config.save_pretrained(tmp_path / "model")
        return str(tmp_path / "model")

    return make


def sized(model: str, **options: Any) -> JobPlan:
    job = {"name": "job", "dataset": {"path": "rows.jsonl"}, "peft": {"r": 16}}
    return plan_job(
        ModelShape.from_hf_config(AutoConfig.from_pretrained(model)),
        FinetuneJob.from_mapping({**job, **options.pop("job", {})}),
        **{"dtype": "bfloat16", "budget_gib": float("inf"), **options},
    )


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    status = main(["plan", *arguments, "--no-profile"])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


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


def test_the_table_in_the_docs_is_what_the_plan_says(write: Write) -> None:
    plans = [sized(write(size)) for size in LLAMA]
    rows = {
        name: [gib(plan.reduction[i][1] * 1024).strip() for plan in plans]
        for i, (name, _) in enumerate(plans[0].reduction)
    }
    text = DOCS.read_text()
    for name, values in rows.items():
        assert f"| {name} | {' | '.join(values)} |" in text


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


def test_refused_budget_names_the_floor(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    model = write("70B")
    status, _, error = run(capsys, model, "--memory-gib", "0.5")
    assert status == 2
    (enough,) = re.findall(r"memory_gib ([0-9.]+)", error)
    assert run(capsys, model, "--memory-gib", enough)[0] == 0
    less = f"{float(enough) - 0.001:.3f}"
    assert run(capsys, model, "--memory-gib", less)[0] == 2


def test_70b_is_printed_from_its_config_with_bars(
    write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    status, text, _ = run(capsys, write("70B"), "--rank", "16", "--memory-gib", "8")
    assert status == 0
    plan = sized(write("70B"), budget_gib=8.0)
    for expected in (
        "80 layers of 8192",
        f"a token: {plan.memory.bytes_per_token:,} bytes",
        f"{plan.parameters:,} parameters",
        "(8 blocks of 128, as on CPU)",
        f"longest sequence that fits: {plan.largest_tokens:,} tokens",
        f"recomputed: {plan.recomputed_share:.1%}",
        "█" * 30,
    ):
        assert expected in text


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


def test_speed_is_predicted_from_a_profile_of_this_machine(
    write: Write, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm_flexft.cli import plan as command

    monkeypatch.setattr(command, "measured_flops", lambda *_: 1e15)
    assert main(["plan", write()]) == 0
    (speed,) = re.findall(r"when idle: ([0-9,]+) tokens/s", capsys.readouterr().out)
    assert int(speed.replace(",", "")) == pytest.approx(1e15 / sized(write()).work.total, rel=0.05)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0123, "0.012"), (1.449, "1.4"), (9.96, "10"), (23.4, "23"), (1249.0, "1,200")],
)
def test_a_prediction_has_two_digits(value: float, text: str) -> None:
    assert two_digits(value) in (text, f"{text}.0")


def test_profile_measures_a_gemm_of_the_model(write: Write) -> None:
    from vllm_flexft.cli.sizing import measured_flops

    shape = ModelShape.from_hf_config(AutoConfig.from_pretrained(write()))
    assert 1e8 < measured_flops(shape, "float32", seconds=0.05) < 1e16


def test_a_picture_of_another_type_is_refused(
    write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as refusal:
        main(["plan", write(), "--png", "p.txt"])
    assert refusal.value.code == 2
    assert "argument --png: p.txt does not end in .png" in capsys.readouterr().err


def test_no_sequence_is_longer_than_the_models_positions(
    write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    _, text, _ = run(capsys, write(), "--memory-gib", "100")
    assert "longest sequence that fits: 131,072 tokens" in text


def test_a_model_that_cannot_be_reached_is_told_once() -> None:
    """In a process of its own: the hub's client takes its settings when it is imported."""
    environment = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, "-m", "vllm_flexft.cli.main", "plan", "nosuch", "--no-profile"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert "nosuch: no model config there" in done.stderr


def test_picture_is_a_png(write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    out = tmp_path / "plan.png"
    assert run(capsys, write(), "--png", str(out))[0] == 0
    assert out.read_bytes().startswith(b"\x89PNG")


def test_job_file_decides_and_options_come_before_it(
    write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = tmp_path / "job.yaml"
    job.write_text(
        "name: j\ndataset: {path: rows.jsonl, max_length: 512}\n"
        "peft: {r: 4, target_modules: [down_proj], layers_to_transform: [30, 31]}\n"
    )
    _, text, _ = run(capsys, write(), str(job))
    assert "backward runs through 2 of them" in text
    assert "for a micro-batch of 512 tokens" in text
    assert f"{2 * 4 * (4096 + 14336):,} parameters" in text
    _, text, _ = run(capsys, write(), str(job), "--max-length", "2048", "--rank", "8")
    assert "for a micro-batch of 2,048 tokens" in text
    assert f"{2 * 8 * (4096 + 14336):,} parameters" in text


def _wrong(case: str, write: Write, folder: Path) -> list[str]:
    job = folder / "job.yaml"
    if case == "no model":
        return [str(folder / "nothing")]
    if case == "no config":
        (folder / "empty").mkdir()
        return [str(folder / "empty")]
    if case == "family":
        return [write(architectures=["GPT2LMHeadModel"])]
    if case == "dtype":
        return [write(dtype="float16")]
    if case == "positions":
        return [write(), "--max-length", "200000"]
    if case == "no job":
        return [write(), str(job)]
    if case == "bad job":
        job.write_text("name: j\ndataset: {path: rows.jsonl}\npeft: {rank: 4}\n")
        return [write(), str(job)]
    if case == "rank":
        return [write(), "--rank", "2048"]
    if case == "length":
        return [write(), "--max-length", "1"]
    if case == "longest":
        return [write(), "--memory-gib", "1", "--max-length", "4096"]
    assert case == "layers"
    job.write_text("name: j\ndataset: {path: rows.jsonl}\npeft: {layers_to_transform: [32]}\n")
    return [write(), str(job)]


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("no model", "nothing: no such folder; give a model folder"),
        ("no config", "empty: no model config there .* give a model folder"),
        ("family", "GPT2LMHeadModel cannot be co-finetuned; supported: Llama"),
        ("dtype", "dtype float16 is not supported; give --dtype float32 or bfloat16"),
        ("positions", "200000 tokens are more than the model's 131072 .* --max-length 131072"),
        ("rank", "peft.r: got 2048, expected an integer, 1 to 512"),
        ("length", "dataset.max_length: got 1, expected an integer >= 2"),
        (
            "longest",
            "at max_length 4,096 .* memory_gib [0-9.]+, .* up to [0-9],[0-9]{3} tokens would",
        ),
        ("no job", "job.yaml: no such file"),
        ("bad job", "job.yaml: peft.rank.*peft.r"),
        ("layers", r"peft.layers_to_transform: \(32,\) .* layers 0..31"),
    ],
)
def test_a_mistake_is_told_in_one_line(
    case: str, message: str, write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    status, text, error = run(capsys, *_wrong(case, write, tmp_path))
    assert (status, text) == (2, "")
    assert len(error.splitlines()) == 1
    assert re.search(message, error), error


@pytest.mark.parametrize("option", ["--max-length", "--memory-gib", "--rank", "--block-size"])
@pytest.mark.parametrize("value", ["0", "-3", "many", "nan"])
def test_numbers_that_make_no_sense_are_refused_by_the_option_s_name(
    option: str, value: str, write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as refusal:
        main(["plan", write(), option, value])
    assert refusal.value.code == 2
    assert f"argument {option}" in capsys.readouterr().err


def test_qwen3_keeps_keys_before_their_norm(tmp_path: Path) -> None:
    config = Qwen3Config(
        architectures=["Qwen3ForCausalLM"], dtype="bfloat16", hidden_size=1024, head_dim=128,
        num_attention_heads=16, num_key_value_heads=8, num_hidden_layers=28, intermediate_size=3072,
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    by_tensor = sized(str(tmp_path)).memory.bytes_by_tensor()
    assert by_tensor["qkv"] == 28 * 2 * (16 + 8) * 128


@pytest.fixture
def with_tokenizer(write: Write) -> str:
    from make_model import make_tokenizer

    model = write()
    make_tokenizer(512, add_bos=True).save_pretrained(model)
    return model


def job_over(folder: Path, rows: int, **training: Any) -> str:
    row = '{"prompt": "one two", "completion": " three"}\n'
    (folder / "rows.jsonl").write_text(row * rows)
    job = FinetuneJob.from_mapping(
        {"name": "j", "dataset": {"path": str(folder / "rows.jsonl")}, "training": training}
    )
    (folder / "job.yaml").write_text(job.to_yaml())
    return str(folder / "job.yaml")


def test_steps_and_tokens_of_the_data_are_counted(
    with_tokenizer: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = job_over(tmp_path, 10, train_batch_size=4, num_train_epochs=2)
    status, text, _ = run(capsys, with_tokenizer, job)
    assert status == 0
    found = re.search(r"10 sequences of 10 rows; (\d+) tokens", text)
    assert found, text
    assert f"steps: 6, of {2 * int(found[1])} tokens together" in text


def test_time_is_the_tokens_over_the_predicted_speed() -> None:
    report = DataReport(1, 1, 0, 0, 0, 100, 50, 1024)
    plan = DataPlan("", report, steps=3, tokens=36_000.0)
    assert plan.lines(1000.0)[-1] == "expected duration when idle: 36 s"
    assert plan.lines(10.0)[-1] == "expected duration when idle: 60 min"
    assert plan.lines(1.0)[-1] == "expected duration when idle: 10.0 h"


def test_a_job_whose_data_is_wrong_is_told_as_refused(
    with_tokenizer: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = job_over(tmp_path, 3)
    (tmp_path / "rows.jsonl").write_text('{"q": "a"}\n')
    status, text, error = run(capsys, with_tokenizer, job)
    assert status == 1
    assert "for a micro-batch" in text
    assert "the job would be refused: " in error
    assert "no known format has these columns: q" in error
    (tmp_path / "rows.jsonl").unlink()
    status, _, error = run(capsys, with_tokenizer, job)
    assert (status, "rows.jsonl: no such file" in error) == (1, True)


def test_without_a_tokenizer_the_data_is_not_counted(
    write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, text, _ = run(capsys, write(), job_over(tmp_path, 3))
    assert status == 0
    assert "data: not counted: no tokenizer in" in text
