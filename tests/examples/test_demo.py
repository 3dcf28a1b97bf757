"""The demo's pictures, tables and jobs; the demo itself is `make demo`."""

from __future__ import annotations

import json
import math
from pathlib import Path

import demo
import demo_report as report
import pytest
from demo_server import DemoError, Server
from demo_traffic import RequestTiming

from vllm_flexft.config import FinetuneJob

JOBS = Path(__file__).parents[2] / "examples" / "jobs"


@pytest.mark.parametrize("path", sorted(JOBS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_example_job_is_valid(path: Path) -> None:
    assert FinetuneJob.from_yaml(path).name == path.stem


def test_percentiles_are_those_of_answered_requests_and_failures_are_counted() -> None:
    timings = [RequestTiming(0.0, ttft=i / 100, tpot=i / 1000) for i in range(101)]
    it = report.latency([*timings, RequestTiming(0.0, error="refused")])
    assert (it.answered, it.failed) == (101, 1)
    assert (it.ttft_p50, it.ttft_p99) == pytest.approx((0.50, 0.99))
    assert (it.tpot_p50, it.tpot_p99) == pytest.approx((0.050, 0.099))


def test_latency_of_no_requests_is_nan_and_no_error() -> None:
    it = report.latency([])
    assert it.answered == 0
    assert math.isnan(it.ttft_p50)
    assert "nan" in report.latency_table([("none", it)], 1000, 50)[2]


def test_latency_table_is_in_milliseconds_and_ends_with_the_objectives() -> None:
    it = report.latency([RequestTiming(0.0, ttft=0.2, tpot=0.03)])
    *_, row, objective = report.latency_table([("while training", it)], 1000, 50)
    assert row.split() == ["while", "training", "1", "0", "200", "200", "30", "30"]
    assert objective.split() == ["objective", "1000", "50"]


def column_heights(lines: list[str]) -> list[int]:
    """Eighths that are filled in every column of a drawn curve."""
    cells = [line.split("│")[1].ljust(60) for line in lines if "│" in line]
    return [
        sum(report.EIGHTHS.index(cell) for cell in column) for column in zip(*cells, strict=True)
    ]


@pytest.mark.parametrize("count", [1, 2, 60, 300])
def test_curve_of_a_falling_loss_falls_from_the_top_to_near_zero(count: int) -> None:
    losses = [4.0 * (count - i) / count for i in range(count)]
    heights = column_heights(report.curve(losses, width=60, height=8))
    assert len(heights) == 60
    assert heights[0] == 64
    assert heights == sorted(heights, reverse=True)
    assert count == 1 or heights[-1] <= 32


def test_curve_heights_are_in_proportion_to_the_values() -> None:
    lines = report.curve([4.0, 2.0, 1.0, 0.0], width=4, height=8)
    assert column_heights(lines)[:4] == [64, 32, 16, 0]
    assert lines[0].startswith("  4.00 │")


@pytest.mark.parametrize("values", [[], [math.nan]])
def test_curve_of_nothing_says_so(values: list[float]) -> None:
    assert report.curve(values) == ["(no values)"]


def test_curve_of_zeros_is_empty_and_no_error() -> None:
    assert set(column_heights(report.curve([0.0, 0.0], width=60))) == {0}


def test_answers_are_wrapped_to_the_width_of_the_screen() -> None:
    lines = report.answers("Why?", [("base", "word " * 50), ("pirate", "Arr,\n matey!")])
    assert max(map(len, lines)) <= report.WIDTH
    assert lines[-1].split() == ["pirate", "Arr,", "matey!"]


def test_questions_shown_are_ones_that_no_training_row_asks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = tmp_path / "rows.jsonl"
    asked = ["What a?", "Tell b"]
    rows.write_text("".join(json.dumps({"messages": [{"content": q}]}) + "\n" for q in asked))
    monkeypatch.setattr(demo, "ROWS", rows)
    assert demo.unseen_questions(["Tell b", "Tell c", "What a?", "What d?"]) == [
        "Tell c",
        "What d?",
    ]


def test_the_model_stands_before_the_flag_that_takes_all_following_words() -> None:
    command = demo.serve_command(8000)
    assert command.index(str(demo.MODEL)) < command.index("--co-finetune") == len(command) - 2


def test_a_server_that_ends_at_once_is_reported_with_the_end_of_its_log(tmp_path: Path) -> None:
    server = Server(
        ["sh", "-c", "echo no such model; exit 3"],
        tmp_path / "server.log",
        port=1,
        environment={},
    )
    with server, pytest.raises(DemoError, match=r"exit status 3[\s\S]*no such model"):
        server.wait_until_ready()
