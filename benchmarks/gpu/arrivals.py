"""Requests for the GPU benchmark: synthetic, or those of the Azure traces, lengths as recorded."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.co_serving.trace import Arrival, read_traces, scale


@dataclass(frozen=True, slots=True)
class Lengths:
    """Log-normal token counts, cut off at `most`."""

    mean: float
    sigma: float  # of the logarithm
    most: int

    def draw(self, rng: random.Random) -> int:
        median = self.mean / math.exp(self.sigma**2 / 2)
        return min(self.most, max(2, round(rng.lognormvariate(math.log(median), self.sigma))))


# Means of the Azure conversation trace of 2023: 1155 tokens of context, 211 generated.
PROMPTS, OUTPUTS = Lengths(1155, 1.0, 6144), Lengths(211, 0.8, 1024)


def synthetic(
    rate: float, seconds: float, seed: int, prompts: Lengths = PROMPTS, outputs: Lengths = OUTPUTS
) -> list[Arrival]:
    """A Poisson process of `rate` requests a second."""
    rng, arrivals, at = random.Random(seed), [], 0.0
    while (at := at + rng.expovariate(rate)) < seconds:
        arrivals.append(Arrival(at, prompts.draw(rng), outputs.draw(rng), "synthetic"))
    return arrivals


def from_traces(
    trace: Sequence[Arrival], rate: float, seconds: float, prompts: Lengths, outputs: Lengths
) -> list[Arrival]:
    """The first arrivals of a trace, gaps scaled to `rate`, lengths cut off only.

    Raises:
        ValueError: the trace is too short.
    """
    count = max(1, round(rate * seconds))
    if len(trace) <= count:
        raise ValueError(f"the trace has {len(trace)} arrivals, {count + 1} are needed")
    span = trace[count].at_s - trace[0].at_s
    factor = seconds / span if span else 0.0
    return [
        Arrival(
            (arrival.at_s - trace[0].at_s) * factor,
            scale(arrival.prompt_tokens, 1.0, 1, prompts.most),
            scale(arrival.output_tokens, 1.0, 2, outputs.most),
            arrival.source,
        )
        for arrival in trace[:count]
    ]


class Traffic:
    """The same requests for every system at a rate.

    Args:
        data_dir: of the Azure traces; None for synthetic requests.
    """

    def __init__(
        self,
        data_dir: Path | None,
        prompts: Lengths = PROMPTS,
        outputs: Lengths = OUTPUTS,
    ) -> None:
        self.lengths = (prompts, outputs)
        self._trace = None if data_dir is None else read_traces(data_dir)

    @property
    def source(self) -> str:
        return "synthetic, log-normal" if self._trace is None else "Azure 2023, both traces"

    def at(self, rate: float, seconds: float) -> list[Arrival]:
        if self._trace is None:
            return synthetic(rate, seconds, 0, *self.lengths)
        return from_traces(self._trace, rate, seconds, *self.lengths)
