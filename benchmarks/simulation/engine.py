"""Plays the worker of the production scheduler on a clock of its own.

Scheduling, planning and learning are the code that serves. Scheduling is synchronous, as on CPU.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

from vllm.v1.core.sched.output import SchedulerOutput

from benchmarks.bare_scheduler import BareEngine
from benchmarks.simulation.plant import Plant, Shape, StepWork
from vllm_flexft.graph.grid import BackwardGrid
from vllm_flexft.plan import PLAN_ATTRIBUTE, MicroBatch, StepPlan, Windows


@dataclass(slots=True)
class Clock:
    """Stands in for the `time` module where the scheduler looks at it."""

    now: float = 1000.0

    def monotonic(self) -> float:
        return self.now

    perf_counter = time = monotonic

    def monotonic_ns(self) -> int:
        return int(self.now * 1e9)

    perf_counter_ns = time_ns = monotonic_ns


@dataclass(slots=True)
class Workload:
    """What steps have a worker do, from the plans alone."""

    shape: Shape
    _batches: dict[tuple[str, int], tuple[MicroBatch, BackwardGrid, int]] = field(
        default_factory=dict
    )  # of a job, with the slices done
    _windows: dict[str, Windows] = field(default_factory=dict)  # by job

    def of(self, scheduler: Any, output: SchedulerOutput) -> StepWork:
        """Call once for each step, in their order."""
        rows, sampled = [], 0
        starts = {r.req_id: r.num_computed_tokens for r in output.scheduled_new_reqs}
        for req_id, count in output.num_scheduled_tokens.items():
            request = scheduler.requests.get(req_id)
            if request is None:
                rows.append((count, starts[req_id] + count))
                continue
            rows.append((count, request.num_computed_tokens))
            sampled += request.num_computed_tokens >= request.num_tokens
        layer_slices: list[int] = []
        loss_slices: list[int] = []
        for plan in _plans(output):
            for piece, top in self._slices(plan):
                (loss_slices if top else layer_slices).append(piece)
        return StepWork(tuple(rows), sampled, tuple(layer_slices), tuple(loss_slices))

    def _slices(self, plan: StepPlan) -> Iterator[tuple[int, bool]]:
        """Tokens of each slice of a plan, and whether it is of the loss."""
        if plan.open_job is not None:
            self._windows[plan.job_id] = plan.open_job.windows
        for batch in plan.begin:
            lowest = 0 if batch.train else self.shape.layers
            grid = BackwardGrid(
                batch.num_tokens, self._windows[plan.job_id], self.shape.layers, lowest
            )
            self._batches[plan.job_id, batch.id] = (batch, grid, 0)
        for part in plan.backward:
            key = (plan.job_id, part.micro_batch)
            batch, grid, done = self._batches[key]
            for index in range(done, done + part.count):
                piece = grid.slice(index)
                yield piece.stop - piece.start, piece.stage == grid.num_layers
            self._batches[key] = (batch, grid, done + part.count)
            if done + part.count == grid.num_slices:
                del self._batches[key]


def _plans(output: SchedulerOutput) -> tuple[StepPlan, ...]:
    return getattr(output, PLAN_ATTRIBUTE, ())


@dataclass(frozen=True, slots=True)
class SimulatedRequest:
    at_s: float
    prompt_tokens: int
    output_tokens: int


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One step as simulated; times in seconds since the start."""

    start: float
    seconds: float
    running: int
    waiting: int
    inference_tokens: int
    decode_rows: int
    finetune_tokens: int
    slices: int
    trained_tokens: int  # of the optimizer update in it
    inference_seconds: float  # what the plant says of it without its finetune work


@dataclass(slots=True)
class Simulation:
    """Runs requests through a scheduler on a plant.

    Attributes, filled by `run`:
        steps: every step.
        token_times: by request, when each of its tokens came.
    """

    engine: BareEngine
    plant: Plant
    workload: Workload
    clock: Clock = field(default_factory=Clock)
    steps: list[StepRecord] = field(default_factory=list)
    token_times: dict[str, list[float]] = field(default_factory=dict)
    _arrivals: list[SimulatedRequest] = field(default_factory=list)

    def answers(self) -> list[tuple[SimulatedRequest, list[float]]]:
        """Each request that came, with the times of its tokens."""
        return list(zip(self._arrivals, self.token_times.values(), strict=True))

    def run(self, requests: Sequence[SimulatedRequest], seconds: float) -> None:
        """Simulate until `seconds` have passed on the clock."""
        start, todo = self.clock.now, sorted(requests, key=lambda r: r.at_s, reverse=True)
        end = start + seconds
        with self._clocks():
            while self.clock.now < end:
                while todo and start + todo[-1].at_s <= self.clock.now:
                    self._add(todo.pop())
                if self.engine.scheduler.has_requests():
                    self._step(start)
                else:
                    self.clock.now = min(end, start + todo[-1].at_s) if todo else end

    def _add(self, request: SimulatedRequest) -> None:
        name = self.engine.ask(request.prompt_tokens, request.output_tokens)
        self.token_times[name] = []
        self._arrivals.append(request)

    def _step(self, start: float) -> None:
        began, scheduler = self.clock.now, self.engine.scheduler
        output = scheduler.schedule()
        scheduler.get_grammar_bitmask(output)
        work = self.workload.of(scheduler, output)
        alone = {r: n for r, n in output.num_scheduled_tokens.items() if r in scheduler.requests}
        rows = tuple(
            row
            for row, req_id in zip(work.rows, output.num_scheduled_tokens, strict=True)
            if req_id in alone
        )
        finetune_tokens = output.total_num_scheduled_tokens - sum(alone.values())
        seconds = self.plant.run(work)
        updates = [plan.optimizer_step for plan in _plans(output)]
        self.steps.append(
            StepRecord(
                start=began - start,
                seconds=seconds,
                running=len(scheduler.running),
                waiting=len(scheduler.waiting),
                inference_tokens=sum(alone.values()),
                decode_rows=sum(n == 1 for n in alone.values()),
                finetune_tokens=finetune_tokens,
                slices=len(work.layer_slices) + len(work.loss_slices),
                trained_tokens=sum(update.step_input_tokens for update in updates if update),
                inference_seconds=self.plant.exact(StepWork(rows, work.sampled)) if alone else 0.0,
            )
        )
        self.clock.now += seconds
        answer = self.engine.execute(output)
        for req_id, sampled in zip(answer.req_ids, answer.sampled_token_ids, strict=True):
            if sampled:
                self.token_times[req_id].append(self.clock.now - start)
        scheduler.update_from_output(output, answer)

    @contextmanager
    def _clocks(self) -> Iterator[None]:
        """Every module of the scheduler that reads the time reads ours."""
        with ExitStack() as stack:
            for name, module in list(sys.modules.items()):
                if name.startswith("vllm_flexft.sched.") and hasattr(module, "time"):
                    stack.enter_context(mock.patch.object(module, "time", self.clock))
            yield
