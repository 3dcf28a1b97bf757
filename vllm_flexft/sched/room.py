"""What a step offers finetuning, what a job may hold, and the plan that is being filled."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from vllm_flexft.config import ActivationPolicy
from vllm_flexft.plan import BackwardSlices, Chunk, OpenJob, OptimizerStep, SaveRequest, Windows
from vllm_flexft.plan import MicroBatch as MicroBatchSpec
from vllm_flexft.sched.latency import NUM_FEATURES, Feature, Vector
from vllm_flexft.sched.planner import Budget
from vllm_flexft.sched.prepared import PreparedJob
from vllm_flexft.sched.sequence_kv import SequenceKV
from vllm_flexft.sched.slice_amounts import SliceAmounts
from vllm_flexft.sched.step_estimate import StepEstimate, Work

EXHAUSTED = 0.03  # of the budget: what is left is not worth another look
ROUNDING_CREDIT = 0.25  # of what requests have saved: the rest is for the prefill of others


@dataclass(frozen=True, slots=True)
class Limits:
    """What a job may take of the engine."""

    windows: Windows
    lane_tokens: int
    num_lanes: int
    max_rows: int  # sequences with chunks in one batch
    lowest_layer: int
    kv_blocks: int  # of each KV-cache group, that a micro-batch of several sequences may hold
    block_size: int  # tokens
    activation_policy: ActivationPolicy
    memory_bytes: float = 0.0  # for all that training allocates
    adapter_parameters: int = 0


def opening(prepared: PreparedJob, limits: Limits, base_model: str, lora_id: int) -> OpenJob:
    """What the worker is told of a job before its first work."""
    return OpenJob(
        job_id=prepared.job_id,
        job=prepared.job,
        config_hash=prepared.config_hash,
        output_dir=str(prepared.output_dir),
        base_model=base_model,
        lora_int_id=lora_id,
        windows=limits.windows,
        lane_tokens=limits.lane_tokens,
        num_lanes=limits.num_lanes,
        activation_policy=limits.activation_policy,
        memory_bytes=limits.memory_bytes,
        resume_from=str(prepared.resume_from) if prepared.resume_from else None,
    )


class Room:
    """What is left of a step after inference; planning draws it down.

    A piece of work fits if the upper bound of its time does. Where nothing was taken yet, a piece
    that cannot be cut may use what all requests have saved, and in an idle step exceed the room:
    otherwise one that is longer than any room would never run.

    Prices say at once what fits, and a little too little: costs are better known together than one
    by one. So what was taken is charged by the bound of the whole step.
    """

    def __init__(
        self,
        budget: Budget,
        prices: Sequence[float],
        *,
        tokens: int,
        rows: int,
        sole_job: bool = True,
        estimate: StepEstimate | None = None,
    ) -> None:
        """
        Args:
            prices: seconds an amount of each `Feature`, at most.
            tokens, rows: what is left of vLLM's token budget and request slots.
            sole_job: no other job has work for this step.
            estimate: of the step as it is, whose bound says what work costs; None: prices do.
        """
        self.budget = budget
        self.idle = budget.idle
        self.seconds = budget.seconds
        self.tokens, self.rows = tokens, rows
        self.sole_job = sole_job
        self.may_begin = True  # a micro-batch: not while a job before this one waits for blocks
        self.spent = 0.0
        self.taken = [0.0] * NUM_FEATURES
        self.lacking = budget.reason  # what the last piece that did not fit needed
        self._price = prices
        self._estimate = estimate
        # What the first chunk pays beside its tokens: running the model at all, where inference
        # does not, and as a step with chunks has to.
        self._start: list[tuple[int, float]] = [(Feature.CHUNKS, 1.0)]
        if budget.idle:
            self._start.append((Feature.STEP, 1.0))

    @property
    def features(self) -> Vector:
        """What was taken."""
        return np.array(self.taken)

    @property
    def exhausted(self) -> bool:
        return self.seconds <= EXHAUSTED * self.budget.seconds

    def fit_slices(self, amounts: SliceAmounts, done: int) -> int:
        """Take as many of the next backward slices as fit; returns how many."""
        row, token, key = self._price[Feature.LOSS : Feature.UPDATE]

        def price(slices: int) -> float:
            rows, tokens, keys = amounts.before(slices)
            return row * rows + token * tokens + key * keys

        begun = price(done)
        later = range(done + 1, amounts.num_slices + 1)
        count = bisect.bisect_right(later, begun + self.seconds, key=price)
        if count < len(later):
            count += self._rounds_up(price(done + count) - begun, price(done + count + 1) - begun)
        if not count:
            first = price(done + 1) - begun
            if not self._may_exceed(first):
                self.lacking = f"a backward slice takes {1e3 * first:.1f} ms"
                return 0
            count = 1
        before, after = amounts.before(done), amounts.before(done + count)
        features = range(Feature.LOSS, Feature.UPDATE)
        work = [(f, b - a) for f, a, b in zip(features, before, after, strict=True)]
        self._take(work, price(done + count) - begun)
        return count

    def _rounds_up(self, short: float, long: float) -> bool:
        """Slices that cost `short` fit, with one more `long`: were that never taken, half a slice
        of every step would be lost. Where more than half of it fits, what requests have saved pays
        for the rest, but for what they need for the prefill of others."""
        over = long - self.seconds
        return 0.0 <= 2.0 * over <= long - short and over <= ROUNDING_CREDIT * self.budget.credit

    def fit_chunk(self, context: int, remaining: int, smallest: int) -> int:
        """Tokens of a chunk that follows `context` tokens of its sequence; 0 if fewer than
        `smallest` fit. Takes nothing: see `take_chunk`."""
        most = min(remaining, self.tokens)
        smallest = min(smallest, remaining)
        if self.rows <= 0 or most < smallest:
            self.lacking = "no request slot" if self.rows <= 0 else "no token of the batch"
            return 0
        start = self._start_price()
        tokens = min(most, self._tokens_for(self.seconds - start, context))
        if tokens < smallest and self._may_exceed(start + self._chunk_price(context, smallest)):
            # As long as what all have saved allows: a chunk's start is best paid once for many.
            seconds = self.seconds if self.idle else self.seconds + self.budget.credit
            return max(smallest, min(most, self._tokens_for(seconds - start, context)))
        if tokens < smallest:
            cost = start + self._chunk_price(context, smallest)
            self.lacking = f"a chunk of {smallest} tokens takes {1e3 * cost:.1f} ms"
            return 0
        if tokens < most and self._estimate is not None:
            return self._lengthened(tokens, most, context)
        return tokens

    def _lengthened(self, tokens: int, most: int, context: int) -> int:
        """A chunk of `tokens` fits by prices; by the bound, a longer one may."""
        short = self._bound_with(context, tokens)
        longer = min(most, int(tokens * self.seconds / max(short, 1e-9)))
        if longer <= tokens:
            return tokens
        long = self._bound_with(context, longer)
        if long <= self.seconds:
            return longer
        # The bound is convex in the chunk's length: it lies below the line between two points.
        between = tokens + int((longer - tokens) * (self.seconds - short) / (long - short))
        return max(tokens, between)

    def take_chunk(self, context: int, tokens: int) -> None:
        cost = self._start_price() + self._chunk_price(context, tokens)
        self._take(self._chunk(context, tokens), cost)
        self._start = []
        self.tokens -= tokens
        self.rows -= 1

    def fit_parameters(self, feature: Feature, parameters: int) -> bool:
        """Take an update, or a snapshot, of so many adapter parameters if it fits."""
        cost = parameters * self._price[feature]
        if cost > self.seconds and not self._may_exceed(cost):
            kind = "an optimizer update" if feature is Feature.UPDATE else "a snapshot"
            self.lacking = f"{kind} takes {1e3 * cost:.1f} ms"
            return False
        self._take([(feature, parameters)], cost)
        return True

    def _tokens_for(self, seconds: float, context: int) -> int:
        """n tokens attend n context + n^2 / 2 keys: solve a n^2 + b n = seconds."""
        seconds = max(0.0, seconds)
        a = 0.5 * self._price[Feature.CHUNK_CONTEXT]
        b = self._price[Feature.CHUNK] + self._price[Feature.CHUNK_CONTEXT] * context
        return int(2.0 * seconds / (b + (b * b + 4.0 * a * seconds) ** 0.5))

    def _start_price(self) -> float:
        return sum(self._price[feature] for feature, _ in self._start)

    def _chunk_price(self, context: int, tokens: int) -> float:
        keys = tokens * (context + 0.5 * tokens)
        price = self._price
        return tokens * price[Feature.CHUNK] + keys * price[Feature.CHUNK_CONTEXT]

    def _chunk(self, context: int, tokens: int) -> list[tuple[int, float]]:
        keys = tokens * (context + 0.5 * tokens)
        work: list[tuple[int, float]] = [(Feature.CHUNK, tokens), (Feature.CHUNK_CONTEXT, keys)]
        return [*self._start, *work]

    def _bound_with(self, context: int, tokens: int) -> float:
        """Seconds, at most, that a chunk adds to what was taken."""
        assert self._estimate is not None
        upper = self._estimate.upper_with(self._chunk(context, tokens))
        return upper - self.budget.bound - self.spent

    def _may_exceed(self, cost: float) -> bool:
        if self.spent > 0.0:
            return False
        return self.idle or (self.seconds > 0.0 and cost <= self.seconds + self.budget.credit)

    def _take(self, work: Work, cost: float) -> None:
        """`cost`: by prices."""
        for feature, amount in work:
            self.taken[feature] += amount
        if self._estimate is None:
            self.spent += cost
        else:
            self._estimate.add(work)
            self.spent = max(self.spent, self._estimate.upper - self.budget.bound)
        self.seconds = max(0.0, self.budget.seconds - self.spent)


@dataclass(frozen=True, slots=True)
class ChunkPrompt:
    """What vLLM is told about a chunk: a part of a longer prompt."""

    token_ids: npt.NDArray[np.int32]  # up to the chunk's end, and one more
    num_computed: int  # of them, before the chunk
    block_ids: tuple[list[int], ...]  # per KV-cache group


@dataclass(slots=True)
class PlannedWork:
    """A step plan under construction, with the tokens behind its chunks."""

    open_job: OpenJob | None = None
    begin: list[MicroBatchSpec] = field(default_factory=list)
    chunks: list[Chunk] = field(default_factory=list)
    prompts: list[ChunkPrompt] = field(default_factory=list)
    lengthened: list[SequenceKV] = field(default_factory=list)  # by a chunk each
    backward: list[BackwardSlices] = field(default_factory=list)
    optimizer_step: OptimizerStep | None = None
    save: SaveRequest | None = None
    refused_blocks: bool = False
    settled: bool = False  # what follows its update is planned

    @property
    def empty(self) -> bool:
        return not (self.chunks or self.backward or self.optimizer_step or self.save)
