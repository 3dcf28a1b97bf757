"""How much time finetuning may take of a step: what inference leaves of its latency objectives.

A pure function of the step's inference load, the objectives, the latency model, and the time by
which the next tokens are due.

- Requests in the step: the upper bound of its predicted time, finetuning included, stays below the
  TPOT objective, and ends before the next token of any request is due (sched/token_times.py): a
  request that was late, by prefill in its steps or by a stall, is first given back what it lost.
  What all of them have saved is credit, up to `CREDIT_SHARE` of the objective, for a piece of work
  that cannot be cut (a backward slice, an update, a snapshot), or whose start costs most of it (a
  chunk), and that may be longer than the room of any one step.
- No requests: a new arrival waits for the running step, so it is bounded by a part of the TTFT
  objective.
- Requests that could run are waiting for a place, or will be within `HORIZON_S` as fast as they
  become more: nothing. So too if they will then need all of the TPOT objective.

`min_share` of the time goes to finetuning in any case, where the operator asked for it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vllm_flexft.config import ServerOptions, SLOConfig
from vllm_flexft.sched.latency import NUM_FEATURES, Feature, LatencyModel, Vector
from vllm_flexft.sched.step_estimate import StepEstimate

DEFAULT_TPOT_MS = 50.0
DEFAULT_TTFT_MS = 5000.0
TPOT_MARGIN = 0.9  # of the objective; the rest is what a token spends outside the engine's step
TTFT_SHARE = 0.1  # a new arrival waits at most this part of its objective for a running step
CREDIT_SHARE = 1.0  # of the TPOT objective: no step is longer than twice it
# A time of overload begins with requests that become more. Finetuning in its first seconds would
# make all that follow wait longer; without overload, these seconds are all that is lost.
HORIZON_S = 12.0
MIN_SHARE_CREDIT_S = 1.0  # with min_share: the longest piece of work that it pays for

NO_FINETUNING = [0.0] * (NUM_FEATURES - Feature.CHUNKS)


@dataclass(frozen=True, slots=True)
class StepLoad:
    """What vLLM scheduled for inference in this step."""

    decode_rows: int = 0  # requests that compute one token
    prefill_tokens: int = 0
    context: int = 0  # keys attended, summed over tokens
    num_waiting: int = 0  # requests that could run but found no place
    num_requests: int = 0  # running and waiting

    @property
    def num_tokens(self) -> int:
        return self.decode_rows + self.prefill_tokens

    @property
    def amounts(self) -> list[float]:
        """Of each `Feature`."""
        if not self.num_tokens:
            return [0.0] * NUM_FEATURES
        return [1.0, self.decode_rows, self.prefill_tokens, self.context, *NO_FINETUNING]

    def features(self) -> Vector:
        return np.array(self.amounts, dtype=np.float64)

    def next(self, block_size: int) -> StepLoad | None:
        """Of the next step if nobody comes or goes, and at most; None if that is not likely."""
        rows = self.num_requests
        if self.num_waiting or (rows and not self.num_tokens):
            return None
        return StepLoad(rows, context=self.context + rows * block_size, num_requests=rows)

    def covers(self, other: StepLoad) -> bool:
        """This load is one like `other`, and of everything as much or more."""
        return (
            other.prefill_tokens <= self.prefill_tokens
            and other.decode_rows <= self.decode_rows
            and other.context <= self.context
            and other.num_requests <= self.num_requests
            and not other.num_waiting
            and bool(other.decode_rows) == bool(self.decode_rows)
        )


@dataclass(frozen=True, slots=True)
class Objectives:
    tpot_s: float = DEFAULT_TPOT_MS / 1e3
    ttft_s: float = DEFAULT_TTFT_MS / 1e3
    min_share: float = 0.0  # of a loaded step's time, for finetuning, whatever the objectives

    @classmethod
    def of(cls, tpot_ms: float | None, ttft_ms: float | None, min_share: float = 0.0) -> Objectives:
        tpot, ttft = tpot_ms or DEFAULT_TPOT_MS, ttft_ms or DEFAULT_TTFT_MS
        return cls(tpot / 1e3, ttft / 1e3, min_share)

    @classmethod
    def strictest(cls, options: ServerOptions, slos: Sequence[SLOConfig | None]) -> Objectives:
        """Of the jobs in training; what a job asks for itself goes before the server's options."""
        each = [
            cls.of(slo.tpot_ms or options.tpot_ms, slo.ttft_ms or options.ttft_ms)
            for slo in (slo or SLOConfig() for slo in slos or [None])
        ]
        tpot_s, ttft_s = min(one.tpot_s for one in each), min(one.ttft_s for one in each)
        return cls(tpot_s, ttft_s, options.min_share)

    @property
    def step_s(self) -> float:
        """What a step may take for the objective's sake."""
        return TPOT_MARGIN * self.tpot_s


@dataclass(frozen=True, slots=True)
class Budget:
    """Of one step, in seconds."""

    seconds: float  # that finetuning may add, by the upper bound of its cost
    credit: float  # more, for one piece of work that cannot be cut, if nothing else is done
    limit: float  # what the step may take in all
    predicted: float  # of inference alone
    bound: float  # of inference alone, upper
    idle: bool  # no inference: one piece of work may exceed `seconds`
    reason: str = ""  # why there is nothing, where there is nothing
    estimate: StepEstimate | None = None  # of inference alone


def allow(
    load: StepLoad,
    objectives: Objectives,
    model: LatencyModel,
    *,
    due_s: float = math.inf,
    growth: float = 0.0,
    rows: int | None = None,
    share_credit: float = 0.0,
) -> Budget:
    """
    Args:
        due_s: until the next token of some request in the step is due.
        growth: requests a second by which they become more.
        rows: of the batch that are still free; None: any number.
        share_credit: what `carry` returned after the step before.
    """
    if load.num_tokens == 0:
        limit = TTFT_SHARE * objectives.ttft_s
        if load.num_waiting:
            return Budget(0.0, 0.0, limit, 0.0, 0.0, False, "requests wait for memory")
        return Budget(limit, 0.0, limit, 0.0, 0.0, True)
    estimate = model.estimate(load.amounts)
    predicted, bound = estimate.mean, estimate.upper
    limit, credit = min(objectives.step_s, due_s), 0.0
    if load.num_waiting:
        slack, reason = 0.0, "requests wait for a place"
    else:
        slack, reason = limit - bound, "inference needs all of the TPOT objective"
    if slack > 0.0 and growth * HORIZON_S >= max(1.0, _room_for(load, slack, rows, model)):
        slack, reason = 0.0, "requests become more"
    if slack > 0.0:
        reason = ""
        if due_s < math.inf:
            credit = min(due_s - limit, CREDIT_SHARE * objectives.tpot_s)
    if share := objectives.min_share:
        floor = predicted * share / (1.0 - share)
        slack, credit, reason = max(slack, floor), max(credit, share_credit), ""
    return Budget(max(0.0, slack), credit, limit, predicted, bound, False, reason, estimate)


def _room_for(load: StepLoad, slack: float, rows: int | None, model: LatencyModel) -> float:
    """How many more requests like those in the step may decode beside them."""
    costs = model.costs
    row, key = (costs.prior[f] * costs.theta[f] for f in (Feature.DECODE, Feature.CONTEXT))
    more = slack / (row + key * load.context / max(1, load.num_requests))
    return more if rows is None else min(more, rows)


def carry(budget: Budget, objectives: Objectives, share_credit: float, spent: float) -> float:
    """What finetuning has not had of its `min_share`, after a step that spent so many seconds of
    `budget`: a piece that cannot be cut may be longer than the share of many steps."""
    if not objectives.min_share or budget.idle or budget.predicted == 0.0:
        return 0.0
    return min(max(0.0, share_credit + budget.seconds - spent), MIN_SHARE_CREDIT_S)
