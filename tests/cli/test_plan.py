"""`flexft plan`: what it prints and draws, and each refusal."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from harness.plan_command import LLAMA, Write, run, sized

from vllm_flexft.cli.main import main
from vllm_flexft.cli.plan_text import gib, two_digits

DOCS = Path(__file__).parents[2] / "docs/memory.md"


def test_the_table_in_the_docs_is_what_the_plan_says(write: Write) -> None:
    plans = [sized(write(size)) for size in LLAMA]
    rows = {
        name: [gib(plan.reduction[i][1] * 1024).strip() for plan in plans]
        for i, (name, _) in enumerate(plans[0].reduction)
    }
    text = DOCS.read_text()
    for name, values in rows.items():
        assert f"| {name} | {' | '.join(values)} |" in text


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


def test_a_picture_of_another_type_is_refused(
    write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as refusal:
        main(["plan", write(), "--png", "p.txt"])
    assert refusal.value.code == 2
    assert "argument --png: p.txt does not end in .png" in capsys.readouterr().err


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
