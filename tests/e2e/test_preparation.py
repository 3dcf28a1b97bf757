"""While a dataset is tokenised, requests get their tokens as fast as without."""

from __future__ import annotations

import itertools
import json
import statistics
import time
from pathlib import Path

import psutil
import pytest
from harness.engine import CoServingEngine
from harness.traffic import Ask, Pump

from vllm_flexft.inprocess import wait_for_jobs

TOKENS = 300


def decode_gap(engine: CoServingEngine) -> float:
    """Median seconds between two tokens of a request that is alone."""
    pump = Pump(engine)
    pump.ask(Ask(tuple(range(10, 40)), max_tokens=TOKENS))
    ends = [time.perf_counter()]
    while not pump.answered:
        pump.step()
        ends.append(time.perf_counter())
    return statistics.median(b - a for a, b in itertools.pairwise(ends))


def test_tokens_keep_coming_while_a_large_dataset_is_tokenised(
    engine: CoServingEngine, tmp_path: Path
) -> None:
    rows = tmp_path / "rows.jsonl"
    line = json.dumps({"prompt": "What is said of owls? " * 8, "completion": " Little. " * 8})
    rows.write_text((line + "\n") * 150_000)
    decode_gap(engine)  # warm-up
    alone = decode_gap(engine)
    name = engine.submit({"dataset": {"path": str(rows)}, "output_dir": str(tmp_path / "out")})
    preparer = engine.scheduler._feed._admission.preparer
    deadline = time.monotonic() + 120
    while preparer.pid is None or psutil.Process(preparer.pid).cpu_times().user < 3.0:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    meanwhile = decode_gap(engine)
    busy_until_the_end = preparer.pid is not None and not engine.scheduler._feed.has_ready()
    engine.store.request_cancel(engine.store.get(name).id)
    wait_for_jobs(engine.llm, timeout=120)
    print(f"seconds between tokens: {alone:.4f} alone, {meanwhile:.4f} beside the tokeniser")
    assert busy_until_the_end
    assert engine.store.get(name).status == "cancelled"
    # The room is for what else runs on the machine; a thread of this process would need more.
    assert meanwhile < 3 * alone


def test_waiting_for_jobs_ends_when_nobody_takes_them_any_more(
    engine: CoServingEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    feed = engine.scheduler._feed

    def end() -> None:
        raise SystemExit("out of threads")

    monkeypatch.setattr(feed, "_lease_next", end)
    engine.submit({"dataset": {"path": "rows.jsonl"}, "output_dir": str(tmp_path / "out")})
    with pytest.raises(RuntimeError, match="finetuning has stopped: SystemExit: out of threads"):
        wait_for_jobs(engine.llm)
