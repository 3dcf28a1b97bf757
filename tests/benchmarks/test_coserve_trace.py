"""Replayed arrivals: order, proportions and rate of the traces."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from benchmarks.co_serving.trace import (
    MAX_OUTPUT,
    MAX_PROMPT,
    MIN_OUTPUT,
    Arrival,
    read_traces,
    stretch,
)

TRACE = [Arrival(float(at), 800, 40, "conv") for at in (0, 1, 2, 4, 8, 16, 32)]


def test_gaps_keep_their_proportions_at_the_wanted_rate() -> None:
    replayed = stretch(TRACE, rate=2.0, seconds=2.0)
    # 4 arrivals in 2 s; the gaps 1, 1, 2 of the trace, and 4 to the next, are a quarter as long
    assert [a.at_s for a in replayed] == pytest.approx([0.0, 0.25, 0.5, 1.0])


def test_a_stretch_may_begin_anywhere_in_the_trace() -> None:
    assert [a.at_s for a in stretch(TRACE, 1.0, 3.0, skip=3)] == pytest.approx([0.0, 3 / 7, 9 / 7])


def test_a_trace_that_is_too_short_is_refused() -> None:
    with pytest.raises(ValueError, match="has 7 arrivals, 11 are needed"):
        stretch(TRACE, rate=1.0, seconds=10.0)


def test_lengths_are_scaled_and_stay_within_the_model() -> None:
    long = [Arrival(float(i), tokens, tokens, "code") for i, tokens in enumerate((1, 800, 10**6))]
    short, usual, longest = stretch([*long, Arrival(3.0, 1, 1, "code")], 1.0, 3.0)
    assert (short.prompt_tokens, short.output_tokens) == (1, MIN_OUTPUT)
    assert (usual.prompt_tokens, usual.output_tokens) == (100, 200)
    assert (longest.prompt_tokens, longest.output_tokens) == (MAX_PROMPT, MAX_OUTPUT)


def test_both_traces_are_read_in_order_of_time(data_dir: Path) -> None:
    trace = read_traces(data_dir)
    assert len(trace) == 19_366 + 8_819
    assert all(a.at_s <= b.at_s for a, b in itertools.pairwise(trace))
    assert {a.source for a in trace[:2000]} == {"conv", "code"}
    assert trace[-1].at_s == pytest.approx(3513, abs=1)  # 18:15:46 to 19:14:20


def test_a_missing_trace_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"azure_llm_2023_conv\.csv is missing"):
        read_traces(tmp_path)
