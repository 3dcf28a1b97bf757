"""Finetune work of a step, of all jobs, drawn before the step is there.

Most steps are like the last one: as many requests, each with one token more. So the next step's
work is drawn while the worker computes this one, and sent if the step comes as was foreseen; else
it is taken back and drawn anew.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import NamedTuple

from vllm.v1.core.sched.output import NewRequestData

from vllm_flexft.sched.pacer import Pacer
from vllm_flexft.sched.planner import StepLoad
from vllm_flexft.sched.room import PlannedWork, Room
from vllm_flexft.sched.run import FinetuneRun
from vllm_flexft.sched.run_set import RunSet
from vllm_flexft.sched.sequence_kv import KVLender
from vllm_flexft.sched.step_output import chunk_requests


class Part(NamedTuple):
    """One job's."""

    run: FinetuneRun
    work: PlannedWork
    requests: list[NewRequestData]  # what vLLM is told of its chunks


@dataclass(slots=True)
class Draft:
    load: StepLoad  # of inference
    room: Room  # and what was taken of it
    parts: list[Part] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)  # by job that had its turn
    lacking: list[tuple[FinetuneRun, str]] = field(default_factory=list)  # got nothing, and why


class Drafts:
    """Draws drafts, and keeps the one of the next step.

    Args:
        fail: ends a job whose work cannot be drawn.
        v2_runner: which of vLLM's model runners the batch is for.
    """

    def __init__(
        self,
        runs: RunSet,
        lender: KVLender,
        pacer: Pacer,
        fail: Callable[[FinetuneRun, Exception], None],
        *,
        max_tokens: int,
        max_rows: int,
        block_size: int,
        v2_runner: bool,
    ) -> None:
        self._runs, self._lender, self._pacer, self._fail = runs, lender, pacer, fail
        self._max_tokens, self._max_rows, self._block_size = max_tokens, max_rows, block_size
        self._v2_runner = v2_runner
        self._next: Draft | None = None

    def of_step(
        self, now: float, load: StepLoad, rows: int, closing: Collection[str] = ()
    ) -> Draft:
        """For the step that is scheduled now, with so many rows of requests. Not of the jobs in
        `closing`."""
        if (ahead := self._next) is not None:
            if self._pacer.holds(now, load, ahead.load, ahead.room):
                self._next = None
                return ahead
            self.take_back()
        tokens, rows = self._max_tokens - load.num_tokens, self._max_rows - rows
        one = len(self._runs) == 1
        room = self._pacer.room(now, load, tokens=tokens, rows=rows, sole_job=one)
        return self._draw(load, room, closing, ahead=False)

    def draw_ahead(self, now: float, load: StepLoad) -> None:
        """What follows a step with this load; nothing where that cannot be foreseen."""
        self.take_back()
        foreseen = load.next(self._block_size)
        if foreseen is None or not self._runs or not all(run.foreseeable for run in self._runs):
            return
        tokens = self._max_tokens - foreseen.num_tokens
        rows = self._max_rows - foreseen.decode_rows
        one = len(self._runs) == 1
        room = self._pacer.room_ahead(now, foreseen, tokens=tokens, rows=rows, sole_job=one)
        self._next = self._draw(foreseen, room, (), ahead=True)
        if not self._next.parts or self._runs.short_of_blocks:
            self.take_back()

    def take_back(self) -> None:
        """Of the next step, before anything else changes what is to be done: a job ends, blocks are
        released."""
        draft, self._next = self._next, None
        for run, work, _ in () if draft is None else draft.parts:
            try:
                run.take_back(work)
            except Exception as error:
                self._fail(run, error)

    def _draw(self, load: StepLoad, room: Room, closing: Collection[str], ahead: bool) -> Draft:
        draft = Draft(load, room)
        for run in self._runs.in_turn():
            if run.job_id in closing:
                continue  # submitted again; its next run opens when the worker closed this one
            spent = room.spent
            try:
                self._draw_run(run, draft, ahead)
            except Exception as error:
                self._fail(run, error)
                continue
            if run.short_of_blocks:
                room.may_begin = False
            elif spent == 0.0 or room.spent > spent:  # else others had left it nothing
                draft.seconds[run.job_id] = room.spent - spent
        return draft

    def _draw_run(self, run: FinetuneRun, draft: Draft, ahead: bool) -> None:
        def reclaim() -> bool:
            return not ahead and self._runs.yield_blocks_to(run, self._lender)

        work = run.draw(draft.room, self._lender, reclaim)
        if work is not None:
            requests = chunk_requests(work, run.lora_id, v2_runner=self._v2_runner)
            if ahead:
                run.drawn_ahead = work
            else:  # in the job's own turn: what follows an update is part of its share
                run.settle(work, draft.room)
            draft.parts.append(Part(run, work, requests))
        elif draft.room.lacking:
            draft.lacking.append((run, draft.room.lacking))
