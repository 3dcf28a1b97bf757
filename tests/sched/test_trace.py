from __future__ import annotations

import csv
import json
import math
import time
from pathlib import Path

from vllm_flexft.sched.trace import RECORD, StepTrace

VALUES = (12.5, 8, 0, 4000, 0, 64, 0, 128, 0, 0, 0.01, 0.008, 0.045, 0.03, 0.04, 5, 100)


def test_a_ring_keeps_the_last_steps_in_order():
    trace = StepTrace(capacity=4)
    for _ in range(6):
        trace.finished(trace.add(*VALUES), 0.031)
    assert len(trace) == 4
    assert trace.records()["step"].tolist() == [2, 3, 4, 5]


def test_a_step_that_finishes_after_it_was_overwritten_changes_no_other():
    trace = StepTrace(capacity=2)
    first = trace.add(*VALUES)
    trace.add(*VALUES)
    trace.add(*VALUES)
    trace.finished(first, 0.5)
    assert all(math.isnan(x) for x in trace.records()["actual"])


def test_json_lines_name_every_field_and_an_unknown_time_is_null(tmp_path: Path):
    trace = StepTrace()
    trace.finished(trace.add(*VALUES), 0.031)
    trace.add(*VALUES)
    trace.dump(tmp_path / "new" / "steps.jsonl")
    first, second = map(json.loads, (tmp_path / "new" / "steps.jsonl").read_text().splitlines())
    assert set(first) == set(RECORD.names)
    assert math.isclose(first["actual"], 0.031, rel_tol=1e-6)
    assert first["layer_tokens"] == 128
    assert (first["finetune_blocks"], first["free_blocks"]) == (5, 100)
    assert second["actual"] is None


def test_csv_has_a_header_and_a_row_a_step(tmp_path: Path):
    trace = StepTrace()
    for _ in range(3):
        trace.finished(trace.add(*VALUES), 0.031)
    trace.dump(tmp_path / "steps.csv")
    with (tmp_path / "steps.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["0", "1", "2"]
    assert float(rows[0]["time"]) == 12.5


def test_a_record_takes_microseconds():
    trace, best = StepTrace(capacity=128), math.inf
    for _ in range(500):
        started = time.perf_counter()
        trace.finished(trace.add(*VALUES), 0.031)
        best = min(best, time.perf_counter() - started)
    assert best < 10e-6
