"""From answers and optimizer updates to the numbers that are reported."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

from benchmarks.co_serving.client import Answer

JUDGED_TOKENS = 32  # of an answer that was cut off: with as many, its time a token is known


@dataclass(frozen=True, slots=True)
class Slo:
    """Objectives of a request, in seconds: it meets both or it does not."""

    tpot_s: float
    ttft_s: float

    def met(self, answer: Answer) -> bool:
        if not answer.complete or answer.ttft_s > self.ttft_s:
            return False
        tpot = answer.tpot_s
        return tpot is None or tpot <= self.tpot_s


@dataclass(frozen=True, slots=True)
class Update:
    """An optimizer update, or a micro-batch of the peft trainer's: when (`time.time`), and the
    tokens that it was the end of training of: input tokens of its rows, without padding, each
    counted once."""

    time: float
    tokens: int


@dataclass(frozen=True, slots=True)
class Window:
    """The measured part of a phase; `began` is when its load, or its training, began."""

    began: float
    start: float
    stop: float

    @property
    def seconds(self) -> float:
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class Result:
    """One system under one load."""

    requests: int
    complete: int
    ttft_mean_ms: float
    ttft_p99_ms: float
    tpot_mean_ms: float
    tpot_p99_ms: float
    attainment: float
    goodput_rps: float
    output_tps: float
    finetune_tps: float

    def as_dict(self) -> dict[str, float]:
        return {key: round(value, 4) for key, value in asdict(self).items()}


def quantile(values: Sequence[float], q: float) -> float:
    """The smallest value that a share of at least `q` does not exceed; nan for no values."""
    if not values:
        return float("nan")
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, -(-int(q * 1e6) * len(ordered) // 10**6) - 1))]


def finetune_tps(updates: Sequence[Update], window: Window) -> float:
    """Tokens trained per second of the window.

    A token counts once its update is done. The step that runs when the window opens, and the one
    that runs when it closes, count by the part of their time that lies inside; a window without
    any update trained nothing.
    """
    ordered = sorted((u for u in updates if u.time > window.began), key=lambda u: u.time)
    if not any(window.start < u.time <= window.stop for u in ordered):
        return 0.0
    tokens, since = 0.0, window.began
    for update in ordered:
        inside = min(update.time, window.stop) - max(since, window.start)
        if inside > 0:
            tokens += update.tokens * inside / (update.time - since)
        since = update.time
    return tokens / window.seconds


def judged(answers: Sequence[Answer]) -> list[Answer]:
    """An answer that was cut off at the end of the load, with `JUDGED_TOKENS` or more, counts as
    complete, its next token as come then: a load that lasts for seconds would else call every
    long answer late."""
    return [
        replace(a, error=None, tokens=[*a.tokens, (a.ended, a.tokens[-1][1] + 1)])
        if a.error == "cut off" and a.ended and a.tokens and a.tokens[-1][1] >= JUDGED_TOKENS
        else a
        for a in answers
    ]


@dataclass(frozen=True, slots=True)
class Phase:
    """A load that ran through a system, and the updates beside it."""

    answers: Sequence[Answer]
    updates: Sequence[Update]
    window: Window


def summarise(phases: Sequence[Phase], slo: Slo) -> Result:
    """Of the requests that came in the windows. One that was cut off is as `judged` says; else it
    misses the objectives, and its times so far stand in the percentiles."""
    inside: list[Answer] = []
    streamed, trained, seconds = 0, 0.0, 0.0
    for phase in phases:
        answers, window = judged(phase.answers), phase.window
        inside += [a for a in answers if window.start <= a.due < window.stop]
        streamed += sum(_streamed(a, window.stop) - _streamed(a, window.start) for a in answers)
        trained += finetune_tps(phase.updates, window) * window.seconds
        seconds += window.seconds
    ttft = [a.ttft_s * 1e3 for a in inside]
    tpot = [t * 1e3 for a in inside if (t := a.tpot_s) is not None]
    met = sum(slo.met(a) for a in inside)
    return Result(
        requests=len(inside),
        complete=sum(a.complete for a in inside),
        ttft_mean_ms=statistics.fmean(ttft) if ttft else float("nan"),
        ttft_p99_ms=quantile(ttft, 0.99),
        tpot_mean_ms=statistics.fmean(tpot) if tpot else float("nan"),
        tpot_p99_ms=quantile(tpot, 0.99),
        attainment=met / len(inside) if inside else float("nan"),
        goodput_rps=met / seconds,
        output_tps=streamed / seconds,
        finetune_tps=trained / seconds,
    )


def _streamed(answer: Answer, until: float) -> int:
    return max((count for at, count in answer.tokens if at <= until), default=0)
