"""A machine of which only the step times are known: a roofline with a fixed cost per step.

The forward of a step is one batch: weights are read once, each token costs two FLOP a parameter,
attention reads the keys and values of what it attends to. A backward slice is a small forward of
its own through one layer, or through the LM head.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Shape:
    """A Llama-shaped decoder in bf16."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int

    @property
    def layer_parameters(self) -> int:
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        return attention + 3 * self.hidden * self.intermediate

    @property
    def head_parameters(self) -> int:
        return self.hidden * self.vocab

    @property
    def kv_bytes(self) -> int:
        """Of one token in all layers."""
        return 2 * 2 * self.layers * self.kv_heads * self.head_dim

    def config(self) -> dict[str, Any]:
        """What differs from another Llama's `config.json`."""
        return {
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "vocab_size": self.vocab,
            "torch_dtype": "bfloat16",
        }


LLAMA_8B = Shape(4096, 14336, 32, 32, 8, 128, 128_256)
SMALL = Shape(768, 2304, 14, 12, 4, 64, 16_384)  # the 121 M parameters of the other benchmarks


@dataclass(frozen=True, slots=True)
class Machine:
    """Effective rates: what large GEMMs and streams reach, not the data sheet."""

    name: str
    device: str  # what vLLM calls it
    flops: float  # a second
    bandwidth: float  # bytes a second
    step_s: float  # of host and launches, each step
    slice_s: float  # of host and launches, each backward slice
    kv_bytes: float  # memory for keys and values


# H200 SXM: 989 dense bf16 TFLOP/s, of which inference GEMMs reach about 60 %; 4.8 TB/s, about 75 %.
H200 = Machine("H200", "cuda", 6e14, 3.6e12, 2e-3, 4e-4, 80e9)
# Two cores with AVX-512 bf16, as `make bench-overhead` finds them: about 900 prefill tokens a
# second and 15 ms a decode step with the 121 M parameters.
CPU = Machine("2 CPU cores", "cpu", 2.2e11, 2.0e10, 6e-3, 1e-3, 1e9)
BACKWARD_FLOP = 2 * 1.4  # a token and parameter: dX, and what is recomputed (sched/costs.py)


@dataclass(frozen=True, slots=True)
class StepWork:
    """What one step does.

    Args:
        rows: (tokens, context after them) of each request or chunk in the batch.
        sampled: rows that go through the LM head.
        layer_slices: tokens of each backward slice of a layer.
        loss_slices: tokens of each loss slice.
    """

    rows: tuple[tuple[int, int], ...] = ()
    sampled: int = 0
    layer_slices: tuple[int, ...] = ()
    loss_slices: tuple[int, ...] = ()


class Plant:
    """Times steps; a log-normal error and rare stalls, from `seed`."""

    def __init__(
        self,
        machine: Machine,
        shape: Shape,
        seed: int = 0,
        noise: float = 0.03,
        stalls: float = 2e-3,
    ) -> None:
        self.machine, self.shape = machine, shape
        self.speed = 1.0  # of its clock; may be changed while it runs
        self._noise, self._stalls = noise, stalls
        self._draw = random.Random(seed)

    def exact(self, work: StepWork) -> float:
        """Seconds of a step without noise."""
        machine, shape, seconds = self.machine, self.shape, self.machine.step_s
        tokens = sum(n for n, _ in work.rows)
        if tokens:
            parameters = shape.layers * shape.layer_parameters
            attended = sum(n * (end - (n - 1) / 2) for n, end in work.rows)
            per_pair = 4 * shape.layers * shape.heads * shape.head_dim  # QK and PV
            flop = 2 * tokens * parameters + per_pair * attended
            flop += 2 * work.sampled * shape.head_parameters
            moved = 2 * (parameters + shape.head_parameters * bool(work.sampled))
            moved += shape.kv_bytes * sum(end for _, end in work.rows)
            seconds += max(flop / machine.flops, moved / machine.bandwidth)
        for n in work.layer_slices:
            seconds += self._slice(
                BACKWARD_FLOP * n * shape.layer_parameters, shape.layer_parameters
            )
        for n in work.loss_slices:
            seconds += self._slice(4 * n * shape.head_parameters, shape.head_parameters)
        return seconds / self.speed

    def run(self, work: StepWork) -> float:
        seconds = self.exact(work) * math.exp(self._draw.gauss(0.0, self._noise))
        return seconds * (3.0 if self._draw.random() < self._stalls else 1.0)

    def _slice(self, flop: float, parameters: int) -> float:
        machine = self.machine
        return machine.slice_s + max(flop / machine.flops, 2 * parameters / machine.bandwidth)
