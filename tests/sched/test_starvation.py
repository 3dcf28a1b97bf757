from __future__ import annotations

import logging

import pytest

from vllm_flexft.sched.starvation import PATIENCE_S, REPEAT_S, StarvationLog

REASON = "requests wait for a place"


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, "vllm.flexft")
    return caplog


def starve(log: StarvationLog, start: float, seconds: float, every: float = 0.05) -> None:
    for i in range(int(seconds / every)):
        log.postponed(start + i * every, "gsm8k", REASON)


def test_a_job_without_progress_says_why(lines: pytest.LogCaptureFixture):
    starve(StarvationLog(), 1000.0, PATIENCE_S + 1)
    (record,) = lines.records
    assert "gsm8k" in record.getMessage()
    assert REASON in record.getMessage()


def test_it_says_so_rarely(lines: pytest.LogCaptureFixture):
    starve(StarvationLog(), 0.0, PATIENCE_S + 2.5 * REPEAT_S)
    assert len(lines.records) == 3


def test_progress_now_and_then_is_progress(lines: pytest.LogCaptureFixture):
    log = StarvationLog()
    for i in range(10):
        starve(log, i * PATIENCE_S, 0.9 * PATIENCE_S)
        log.progress((i + 0.95) * PATIENCE_S)
    assert not lines.records


def test_the_end_of_it_is_told_where_its_begin_was(lines: pytest.LogCaptureFixture):
    log = StarvationLog()
    starve(log, 0.0, PATIENCE_S + 10)
    log.progress(PATIENCE_S + 10)
    assert [record.levelname for record in lines.records] == ["WARNING", "INFO"]
    log.progress(PATIENCE_S + 11)
    assert len(lines.records) == 2
