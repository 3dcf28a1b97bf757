"""Sets finetuning's pace: before each step its room, after each what there is to learn.

Holds the latency model, the objectives and when tokens are due; the same object runs in the engine
and in the simulator. Time is passed in, nothing is read from a clock or from vLLM.

    room = pacer.room(now, load, tokens=..., rows=...)  # planning draws it down
    pacer.holds(now, load, foreseen, room)              # one that was drawn down ahead
    pacer.planned(key, now, load, room)                 # once a step, with or without finetuning
    pacer.learn()                                       # while it runs
    pacer.finished(key, now)                            # when its output is there
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

from vllm_flexft.sched.growth import Growth
from vllm_flexft.sched.latency import SCALING_STEPS, Feature, LatencyModel
from vllm_flexft.sched.planner import Budget, Objectives, StepLoad, allow, carry
from vllm_flexft.sched.room import Room
from vllm_flexft.sched.step_estimate import StepEstimate
from vllm_flexft.sched.token_times import TokenTimes
from vllm_flexft.sched.trace import StepTrace

# Steps without a job teach what inference costs: all of the first, then a few.
WARM_STEPS = 64
SAMPLE_EVERY = 16
# Loaded steps in a row in which no piece of work fitted, before one is tried at the least it may
# cost: what is never tried is never learnt.
PROBE_AFTER = 100

MOST_TO_LEARN = 16  # steps that may wait to be learnt


@dataclass(slots=True)
class _Running:
    features: Sequence[float]
    scheduled: float
    follows: bool  # straight after another step: the engine had work all the time
    learn: bool
    record: int | None  # in the trace


class Pacer:
    def __init__(
        self, model: LatencyModel, objectives: Objectives, trace: StepTrace | None = None
    ) -> None:
        self._model, self.trace = model, trace
        self._to_learn: list[tuple[Sequence[float], float]] = []  # steps, and their seconds
        self.tokens = TokenTimes(objectives.step_s)
        self.objectives = objectives
        self._growth = Growth()
        self._share_credit = 0.0
        self._busy_until = 0.0  # by the bounds of the steps in flight
        self._running: dict[Hashable, _Running] = {}
        self._last_finish: float | None = None  # None: the engine has waited for work since
        self._num_quiet = 0  # steps without a job
        self._num_refused = 0  # steps with time for finetuning that no piece of it fitted

    @property
    def objectives(self) -> Objectives:
        return self._objectives

    @objectives.setter
    def objectives(self, objectives: Objectives) -> None:
        self._objectives = objectives
        self.tokens.set_objective(objectives.step_s)

    @property
    def model(self) -> LatencyModel:
        """With what the finished steps teach."""
        self.learn()
        return self._model

    def learn(self) -> None:
        """Take in what the finished steps teach. For a time at which nobody waits: it takes as long
        as a plan."""
        if self._to_learn:
            steps, self._to_learn = self._to_learn, []
            for features, seconds in steps:
                self._model.observe(features, seconds)
            _ = self._model.costs  # for the next plan

    def model_state(self) -> dict[str, Any]:
        """Of what was learnt by now. Learns nothing: it is asked for after a failure too."""
        return self._model.state()

    @property
    def num_in_flight(self) -> int:
        """Steps that were planned and have not finished."""
        return len(self._running)

    def room(
        self, now: float, load: StepLoad, *, tokens: int, rows: int, sole_job: bool = True
    ) -> Room:
        """What finetuning may do in a step; `tokens`, `rows`: what inference left of them."""
        if not load.num_tokens:
            self.learn()
        self._growth.update(now, load.num_requests)
        return self.room_ahead(now, load, tokens=tokens, rows=rows, sole_job=sole_job)

    def room_ahead(
        self, now: float, load: StepLoad, *, tokens: int, rows: int, sole_job: bool = True
    ) -> Room:
        """As `room`, of a step that is foreseen while another one runs."""
        start = self._start(now)
        budget = allow(
            load,
            self._objectives,
            self._model,
            due_s=self.tokens.due(start) - start,
            growth=self._growth.rate,
            rows=rows,
            share_credit=self._share_credit,
        )
        prices, estimate = self._prices(budget)
        return Room(budget, prices, tokens=tokens, rows=rows, sole_job=sole_job, estimate=estimate)

    def holds(self, now: float, load: StepLoad, foreseen: StepLoad, room: Room) -> bool:
        """Whether what was taken of `room`, in a step with the load `foreseen`, may be done in this
        one. No more than this one leaves may then be taken."""
        self._growth.update(now, load.num_requests)
        if not foreseen.covers(load):
            return False
        start = self._start(now)
        left = self.tokens.due(start) - start - room.budget.bound - room.spent
        room.seconds = min(room.seconds, max(0.0, left))
        if left >= 0.0:
            return True
        share = self._objectives.min_share  # is had in any case
        floor = room.budget.predicted * share / (1.0 - share)
        return share > 0.0 and room.spent <= max(floor, self._share_credit)

    def _prices(self, budget: Budget) -> tuple[Sequence[float], StepEstimate | None]:
        """What work is charged at in a step, and the estimate of the whole step if that is less."""
        model = self._model
        if self._num_refused >= PROBE_AFTER:
            return model.prices(optimistic=True).tolist(), None
        if budget.idle and model.num_observed >= SCALING_STEPS:
            # No token is late for it, and steps of all sizes teach what each of their parts costs.
            return model.expected_prices().tolist(), None
        return model.costs.prices, budget.estimate or model.estimate(NOTHING)

    def planned(
        self,
        key: Hashable,
        now: float,
        load: StepLoad,
        room: Room | None,
        *,
        measurable: bool = True,
        blocks: tuple[int, int] = (0, 0),
    ) -> None:
        """A step was scheduled.

        Args:
            key: names the step until `finished`.
            room: what finetuning took; None without a job.
            measurable: its time says something about its work; not if it waits for a disk.
            blocks: of the KV cache, held by finetuning and free.
        """
        if load.decode_rows:
            self.tokens.step()
        if room is None:
            self._num_quiet += 1
            many = self._num_quiet > WARM_STEPS and self._num_quiet % SAMPLE_EVERY
            if many and self.trace is None:
                self._running[key] = _Running(NOTHING, now, self._follows, False, None)
                return
        features = load.amounts
        record = None
        if room is not None:
            features = [a + b for a, b in zip(features, room.taken, strict=True)]
            features[Feature.STEP] = min(1.0, features[Feature.STEP])
            refused = room.budget.seconds > 0.0 and room.spent == 0.0 and bool(room.lacking)
            probed = self._num_refused >= PROBE_AFTER
            self._num_refused = self._num_refused + 1 if refused and not probed else 0
            budget = room.budget
            self._share_credit = carry(budget, self._objectives, self._share_credit, room.spent)
            self._busy_until = self._start(now) + budget.bound + room.spent
        if self.trace is not None:
            record = self._record(self.trace, now, load, room, features, blocks)
        self._running[key] = _Running(features, now, self._follows, measurable, record)

    def _start(self, now: float) -> float:
        """When a step that is planned now starts: with asynchronous scheduling, after those that
        still run."""
        return max(now, self._busy_until) if self._running else now

    @property
    def _follows(self) -> bool:
        return self._last_finish is not None

    def finished(self, key: Hashable, now: float) -> None:
        """The output of a step is there. Steps may be scheduled before the last one finished: the
        time of a step is then what passed since that one did."""
        step = self._running.pop(key, None)
        if step is None:
            return
        start = step.scheduled
        if self._last_finish is not None and (step.follows or self._last_finish > start):
            start = self._last_finish
        self._last_finish = now
        if step.record is not None and self.trace is not None:
            self.trace.finished(step.record, now - start)
        if step.learn:
            self._to_learn.append((step.features, now - start))
            if len(self._to_learn) >= MOST_TO_LEARN:
                self.learn()

    def idle(self) -> None:
        """The engine is about to wait for work: what passes until the next step is not its time."""
        self._last_finish = None

    def _record(
        self,
        trace: StepTrace,
        now: float,
        load: StepLoad,
        room: Room | None,
        features: Sequence[float],
        blocks: tuple[int, int],
    ) -> int:
        predicted, bound = self._model.predict(features)
        budget = NO_BUDGET if room is None else room.budget
        return trace.add(
            now,
            load.decode_rows,
            load.prefill_tokens,
            load.context,
            load.num_waiting,
            features[Feature.CHUNK],
            features[Feature.LOSS],
            features[Feature.LAYER],
            features[Feature.UPDATE] > 0,
            features[Feature.SAVE] > 0,
            budget.seconds,
            0.0 if room is None else room.spent,
            budget.limit,
            predicted,
            bound,
            *blocks,
        )


NOTHING = StepLoad().amounts
NO_BUDGET = Budget(0.0, 0.0, 0.0, 0.0, 0.0, False, "no job")
