"""vllm_flexft/obs/progress.py"""

from pathlib import Path

import pytest

from vllm_flexft.obs.progress import (
    RunSummary,
    eta_s,
    format_duration,
    format_step,
    format_summary,
    format_validation,
)

STEP = {
    "name": "gsm8k",
    "step": 12,
    "total_steps": 300,
    "loss": 1.2341,
    "learning_rate": 1.9e-4,
    "grad_norm": 0.8123,
    "tokens_per_second": 312.4,
    "eta_s": 250.0,
}


def test_a_step_is_one_line() -> None:
    assert format_step(**STEP) == (
        "[gsm8k] step  12/300  loss 1.234  lr 1.9e-04  grad_norm 0.81  312 tok/s  eta 4m10s"
    )


def test_the_lines_of_a_run_align() -> None:
    lines = [format_step(**STEP | {"step": step}) for step in (9, 99, 300)]
    assert len({len(line) for line in lines}) == 1


def test_nan_is_shown() -> None:
    assert "loss nan" in format_step(**STEP | {"loss": float("nan")})


def test_a_validation_is_one_line() -> None:
    line = format_validation(name="x", step=50, eval_loss=0.9871, eval_mean_token_accuracy=0.714)
    assert line == "[x] step 50  eval_loss 0.987  eval_mean_token_accuracy 0.71"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"),
        (-3, "0s"),
        (59.4, "59s"),
        (59.6, "1m00s"),
        (250, "4m10s"),
        (3599.6, "1h00m"),
        (3725, "1h02m"),
        (86399, "1d00h"),
        (2 * 86400 + 3 * 3600, "2d03h"),
    ],
)
def test_durations_show_their_two_largest_units(seconds, text) -> None:
    assert format_duration(seconds) == text


def test_the_eta_of_a_resumed_run_counts_only_its_own_steps() -> None:
    # Resumed at 80, now at 90: 10 steps took 20 s, 10 are left.
    assert eta_s(step=90, total_steps=100, steps_timed=10, elapsed_s=20.0) == 20.0


def test_the_summary_says_what_where_and_under_which_name() -> None:
    summary = format_summary(
        RunSummary(
            name="gsm8k",
            served_as="gsm8k",
            adapter_dir=Path("/a/gsm8k"),
            steps=300,
            first_loss=2.5,
            last_loss=0.75,
            num_input_tokens=123456,
            num_tokens=6543,
            wall_s=400.0,
        )
    )
    assert summary == (
        "[gsm8k] done: 300 steps in 6m40s\n"
        "  loss     2.500 -> 0.750\n"
        "  tokens   123,456 (6,543 supervised), 309 tok/s\n"
        "  adapter  /a/gsm8k\n"
        '  served   as model "gsm8k"'
    )
