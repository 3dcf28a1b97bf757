"""What a job takes of memory: adapter state, working buffers, and activations in lanes.

All sizes follow from the model's config and the job, so that `flexft plan`, the admission of a job
and the worker that opens it come to the same number.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from vllm_flexft.config import ActivationPolicy, FinetuneJob
from vllm_flexft.graph.families import target_layers, target_names
from vllm_flexft.graph.memory import (
    MemoryPlan,
    adapter_parameters,
    plan_memory,
    training_state_bytes,
    working_bytes,
)
from vllm_flexft.graph.ops import ModelShape
from vllm_flexft.graph.policy import Policy
from vllm_flexft.graph.windows import backward_windows, logits_rows
from vllm_flexft.plan import Windows


@dataclass(frozen=True, slots=True)
class Lanes:
    """A lane holds the activations of one micro-batch."""

    count: int
    tokens: int  # of each

    @property
    def total_tokens(self) -> int:
        return self.count * self.tokens


# What a server with memory to spare gives a job: the next micro-batch's forward may overlap the
# last slices of the one before, and short sequences share a micro-batch.
SERVED_LANES = Lanes(2, 2048)


@dataclass(frozen=True, slots=True)
class JobMemory:
    shape: ModelShape
    targets: tuple[str, ...]
    layers: tuple[int, ...]
    rank: int
    optim: str
    itemsize: int  # bytes of a number of the model
    policy: Policy
    logits_rows: int  # that exist at a time

    @classmethod
    def of(
        cls,
        shape: ModelShape,
        job: FinetuneJob,
        itemsize: int,
        policy: ActivationPolicy,
        windows: Windows | None = None,
    ) -> JobMemory:
        """`windows`: of the backward, those of a GPU, which are larger, unless given. Raises
        ValueError for layers that the model lacks."""
        return cls(
            shape=shape,
            targets=target_names(job.peft.target_modules),
            layers=target_layers(job.peft.layers_to_transform, shape.num_layers),
            rank=job.peft.r,
            optim=job.training.optim,
            itemsize=itemsize,
            policy="fast" if policy == "offload" else policy,
            logits_rows=logits_rows(windows or backward_windows(shape, "cuda")),
        )

    @property
    def parameters(self) -> int:
        """Of the adapter."""
        return adapter_parameters(self.shape, self.targets, self.layers, self.rank)

    @property
    def state_bytes(self) -> int:
        return training_state_bytes(self.parameters, self.optim)

    def working_bytes(self, lanes: Lanes) -> int:
        return working_bytes(self.shape, lanes.tokens, lanes.count, self.logits_rows, self.itemsize)

    def plan(self, lanes: Lanes, memory_bytes: float, policy: Policy | None = None) -> MemoryPlan:
        """What is kept with these lanes. Raises ValueError where not even the least fits, with
        the `memory_gib` that would do."""
        return plan_memory(
            self.shape,
            targets=self.targets,
            layers=self.layers,
            tokens=lanes.total_tokens,
            context=lanes.tokens,
            itemsize=self.itemsize,
            memory_bytes=memory_bytes,
            other_bytes=self.state_bytes + self.working_bytes(lanes),
            policy=policy or self.policy,
        )

    def taken_bytes(
        self, lanes: Lanes, policy: Policy | None = None, budget: float = math.inf
    ) -> int:
        """All that the job allocates with these lanes. Raises as `plan`."""
        kept = self.plan(lanes, budget, policy).bytes_per_token * lanes.total_tokens
        return kept + self.working_bytes(lanes) + self.state_bytes

    def check(self, longest: int, memory_bytes: float) -> None:
        """Raises ValueError where not even one lane of the longest sequence fits."""
        self.plan(Lanes(1, longest), memory_bytes, self.least_policy)

    def lanes_within(self, longest: int, memory_bytes: float) -> Lanes:
        """The lanes to train with: `SERVED_LANES`, at least as long as the longest sequence; the
        floor is one lane of that sequence.

        A second lane is worth least, then room for several sequences in one: both go before
        anything is recomputed.
        """
        tokens = max(SERVED_LANES.tokens, longest)
        floor = Lanes(1, longest)
        policy: Policy = "minimal" if self.policy == "minimal" else "fast"
        for lanes in (Lanes(SERVED_LANES.count, tokens), Lanes(1, tokens)):
            try:
                self.plan(lanes, memory_bytes, policy)
            except ValueError:
                continue
            return lanes
        return floor

    @property
    def least_policy(self) -> Policy:
        return "fast" if self.policy == "fast" else "minimal"
