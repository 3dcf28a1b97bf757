"""Arrivals of the Azure LLM inference traces of 2023, scaled to a small model.

Both traces are of the same hour of production. They are merged as they came, chat and coding
requests side by side, so that a stretch of them has long prompts with short answers and the
reverse, and the bursts that a Poisson process lacks.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

FILES = {"conv": "azure_llm_2023_conv.csv", "code": "azure_llm_2023_code.csv"}
# Means of the traces: 1155 and 2048 tokens of context, 211 and 28 generated. An eighth and a
# quarter keep prefill and decode both at work on a model of 100 M parameters.
PROMPT_SCALE, OUTPUT_SCALE = 1 / 8, 1 / 4
MAX_PROMPT, MAX_OUTPUT = 1024, 256
MIN_OUTPUT = 2  # time per output token is defined from the second token on


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request: when, after the start of the replay, and how long."""

    at_s: float
    prompt_tokens: int
    output_tokens: int
    source: str


def read_traces(data_dir: Path) -> list[Arrival]:
    """Both traces in order of time, lengths as recorded.

    Raises:
        FileNotFoundError: a trace is not in `data_dir`.
    """
    rows = []
    for source, name in FILES.items():
        path = data_dir / name
        if not path.exists():
            raise FileNotFoundError(f"{path} is missing: --data-dir must hold the Azure traces")
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                # Seven decimals: more than datetime reads.
                at = datetime.fromisoformat(row["TIMESTAMP"][:26])
                rows.append((at, int(row["ContextTokens"]), int(row["GeneratedTokens"]), source))
    rows.sort(key=lambda row: row[0])
    first = rows[0][0]
    return [Arrival((at - first).total_seconds(), *rest) for at, *rest in rows]


def scale(length: int, by: float, least: int, most: int) -> int:
    return min(most, max(least, round(length * by)))


def stretch(trace: Sequence[Arrival], rate: float, seconds: float, skip: int = 0) -> list[Arrival]:
    """A run of consecutive arrivals after the first `skip`, at `rate` a second on average over
    `seconds`: gaps keep their proportions, lengths are scaled to the model.

    Raises:
        ValueError: the trace is too short.
    """
    count = max(1, round(rate * seconds))
    part = trace[skip : skip + count + 1]
    if len(part) < count + 1:
        raise ValueError(f"the trace has {len(trace)} arrivals, {skip + count + 1} are needed")
    start, span = part[0].at_s, part[-1].at_s - part[0].at_s
    factor = seconds / span if span else 0.0
    return [
        Arrival(
            at_s=(arrival.at_s - start) * factor,
            prompt_tokens=scale(arrival.prompt_tokens, PROMPT_SCALE, 1, MAX_PROMPT),
            output_tokens=scale(arrival.output_tokens, OUTPUT_SCALE, MIN_OUTPUT, MAX_OUTPUT),
            source=arrival.source,
        )
        for arrival in part[:-1]
    ]
