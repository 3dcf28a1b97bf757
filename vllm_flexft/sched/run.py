"""One job in training, as the scheduler sees it: which work comes next.

An optimizer step is a list of micro-batches; each goes forward (chunks) and then backward
(slices); when all are through, the update is planned, then what follows it (evaluation,
checkpoint), then the next step. `draw` takes as much of that as the budget allows, `commit` makes
it the plan of a step, `take_back` undoes it where the step did not come. Nothing here waits for the
worker: progress is what was planned.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import replace

from vllm_flexft.config import FinetuneJob
from vllm_flexft.plan import (
    BackwardSlices,
    Chunk,
    OptimizerStep,
    SaveRequest,
    StepPlan,
    StepResult,
)
from vllm_flexft.sched.grouping import MicroBatchQueue
from vllm_flexft.sched.latency import Feature
from vllm_flexft.sched.micro_batch import ScheduledMicroBatch
from vllm_flexft.sched.prepared import PreparedJob
from vllm_flexft.sched.progress import Record, RunProgress
from vllm_flexft.sched.room import ChunkPrompt, Limits, PlannedWork, Room, opening
from vllm_flexft.sched.sequence_kv import KVLender
from vllm_flexft.sched.starvation import StarvationLog
from vllm_flexft.sched.step_rows import StepRows

MIN_CHUNK = 16  # tokens; a smaller one costs more in overhead than it moves
GOOD_CHUNK = 64  # tokens; fewer are left for a later step when this one has other work


class FinetuneRun:
    def __init__(
        self, prepared: PreparedJob, limits: Limits, num_layers: int, base_model: str, lora_id: int
    ) -> None:
        self.prepared, self.limits = prepared, limits
        self.lora_id, self._base_model, self._num_layers = lora_id, base_model, num_layers
        self.step = prepared.resume_step  # optimizer steps planned so far
        self.counters = prepared.counters
        self.progress = RunProgress(
            prepared.counters, prepared.job.training.early_stopping_patience
        )
        self.short_of_blocks = False  # and had nothing else to do in its last turn
        self.starvation = StarvationLog()
        self.drawn_ahead: PlannedWork | None = None  # counts as done, and was not sent
        self.waiting_for_writer = False  # all is planned; only the final adapter is awaited
        self._opened = self._open_sent = False
        self._chunks_flow = 0  # chunks of the last plan: for as many blocks are borrowed ahead
        self._next_id = 0
        self._chunk_id = 0
        self._queue = MicroBatchQueue((), limits)  # micro-batches not yet made
        self._made: ScheduledMicroBatch | None = None  # the next to begin
        self._next_rows: StepRows | None = None  # of the next optimizer step
        self._loss_scale = 0.0
        self._step_input_tokens = 0
        self._active: list[ScheduledMicroBatch] = []
        self._retired: list[ScheduledMicroBatch] = []  # through; blocks go back next step
        self._evaluating = False
        self._after_update = False  # evaluation and checkpoint of `step` are still to be planned
        self._start_step()

    @property
    def job_id(self) -> str:
        return self.prepared.job_id

    @property
    def job(self) -> FinetuneJob:
        return self.prepared.job

    @property
    def total_steps(self) -> int:
        return self.prepared.order.total_steps

    def on_result(self, result: StepResult) -> list[Record]:
        self._opened = self._opened or result.opened
        planned = self._evaluating and not self._to_begin and not self._active
        return self.progress.on_result(result, all_evaluation_planned=planned)

    # ---- planning

    @property
    def foreseeable(self) -> bool:
        """Forward and backward of an optimizer step are under way: what comes next can be drawn
        ahead, and taken back."""
        return self._opened and not (
            self._evaluating or self._after_update or self.waiting_for_writer
        )

    def draw(
        self, room: Room, lender: KVLender, reclaim: Callable[[], bool] = lambda: False
    ) -> PlannedWork | None:
        """Fill `room` with the next work; None when nothing fits or nothing is left.

        `reclaim` has another job give blocks back; False when there are none to give.
        """
        for batch in self._retired:
            batch.release(lender)
        self._retired.clear()
        work = PlannedWork()
        if not self._opened:
            return self._open(work)
        # The worker updates and saves once a step, last: what comes after them is for later plans.
        while work.optimizer_step is None and work.save is None:
            if room.exhausted or not self._advance(work, room, lender, reclaim):
                break
        self.short_of_blocks = work.empty and work.refused_blocks
        self._chunks_flow = len(work.chunks)
        return None if work.empty and not self.waiting_for_writer else work

    def commit(self, work: PlannedWork, room: Room) -> StepPlan:
        """The step that `work` was drawn for is sent."""
        self.drawn_ahead = None
        self.starvation.progress(time.monotonic())
        self.settle(work, room)
        return StepPlan(
            job_id=self.job_id,
            open_job=work.open_job,
            begin=tuple(work.begin),
            chunks=tuple(work.chunks),
            backward=tuple(work.backward),
            optimizer_step=work.optimizer_step,
            save=work.save,
            wait_for_writer=self.waiting_for_writer and room.idle and room.sole_job,
        )

    def settle(self, work: PlannedWork, room: Room) -> None:
        """Plan what follows the update in `work`, if any; it cannot be taken back then."""
        if work.optimizer_step is not None and not work.settled:
            work.settled = True
            self._updated(work, room)

    def take_back(self, work: PlannedWork) -> None:
        """The step that `work` was drawn for does not come. Of one that was `foreseeable`, and
        before any blocks are released."""
        self.drawn_ahead = None
        for slices in reversed(work.backward):
            batch = next(b for b in (*self._retired, *self._active) if b.id == slices.micro_batch)
            if batch.finished:
                self._retired.remove(batch)
                self._active.insert(0, batch)
            batch.slices_done -= slices.count
            if slices.block_ids is not None:
                batch.located = False
        for chunk, kv in zip(work.chunks, work.lengthened, strict=True):
            kv.num_tokens -= chunk.num_tokens
        begun = {spec.id for spec in work.begin}
        for batch in self._active:
            batch.shortened()
            if batch.id in begun:
                batch.begun = False

    def prepare(self, lender: KVLender) -> None:
        """Make what the next plans will ask for, while nobody waits."""
        batch = self._forwarding
        if batch is not None:
            # No more than the next plan may take: what is borrowed may have been a cached prefix.
            for sequence in itertools.islice(batch.unforwarded(), self._chunks_flow):
                if not lender.borrow(sequence.kv):
                    break
        if self._made is None and self._queue:
            self._made = self._make_next()
        step = self.step if self._after_update else self.step + 1
        if step < self.total_steps and (self._next_rows is None or self._next_rows.step != step):
            self._next_rows = StepRows.of(self.prepared, step)

    def release_blocks(self, lender: KVLender) -> bool:
        """Inference needs memory: what was borrowed ahead goes back, and then the youngest
        micro-batch with blocks gives them up."""
        assert self.drawn_ahead is None, "its keys and values would never be computed"
        self._chunks_flow = 0
        if any(batch.release_unused(lender) for batch in self._active):
            return True
        return any(batch.release(lender) for batch in reversed(self._retired + self._active))

    def release_all(self, lender: KVLender) -> None:
        while self.release_blocks(lender):
            pass

    def _advance(
        self, work: PlannedWork, room: Room, lender: KVLender, reclaim: Callable[[], bool]
    ) -> bool:
        """Plan what fits now: slices of the oldest micro-batch, then, with what they leave, chunks
        of the next one to go forward; when there is none of either, what closes the optimizer
        step. False when nothing more fits.

        Neither can starve the other: slices wait for the forward of their own micro-batch, and
        chunks run out of lanes. In order, since the slices' order is that of summation, and a
        later micro-batch must not take the memory that an earlier one needs.
        """
        progress = False
        if self._active and self._active[0].forwarded:
            progress = self._plan_slices(self._active[0], work, room)
        batch = self._forwarding
        if batch is None and room.may_begin:
            batch = self._begin_next()
        if batch is not None:
            progress = self._plan_chunks(batch, work, room, lender, reclaim) or progress
        if self._active or self._to_begin:
            return progress
        return self._close_phase(work, room) or progress

    def _plan_slices(self, batch: ScheduledMicroBatch, work: PlannedWork, room: Room) -> bool:
        count = room.fit_slices(batch.amounts, batch.slices_done)
        if not count:
            return False
        batch.slices_done += count
        located, batch.located = batch.located, True
        if located and work.backward and work.backward[-1].micro_batch == batch.id:
            last = work.backward[-1]
            work.backward[-1] = replace(last, count=last.count + count)
        else:
            block_ids = None if located else batch.block_ids
            work.backward.append(BackwardSlices(batch.id, count, block_ids))
        if batch.finished:
            self._active.remove(batch)
            self._retired.append(batch)
        return True

    def _plan_chunks(
        self,
        batch: ScheduledMicroBatch,
        work: PlannedWork,
        room: Room,
        lender: KVLender,
        reclaim: Callable[[], bool],
    ) -> bool:
        planned = False
        for sequence in batch.unforwarded():
            if room.exhausted and planned:
                break
            start = sequence.kv.num_tokens
            # Beside other work a chunk must be worth its overhead; alone it is better than nothing.
            smallest = MIN_CHUNK if work.empty else GOOD_CHUNK
            tokens = room.fit_chunk(start, sequence.remaining, smallest)
            if not tokens or len(work.chunks) >= self.limits.max_rows:
                break
            while not (extended := lender.extend(sequence.kv, tokens)):
                if not reclaim():
                    break
            if not extended:
                work.refused_blocks = True
                room.lacking = "no KV-cache blocks are free"
                break
            if not batch.begun:
                batch.begun = True
                work.begin.append(batch.spec)
            self._chunk_id += 1
            work.chunks.append(
                Chunk(
                    req_id=f"flexft-{self.lora_id}-{self._chunk_id}",
                    lane=batch.lane,
                    row=sequence.row + start,
                    num_tokens=tokens,
                )
            )
            work.prompts.append(
                ChunkPrompt(
                    token_ids=batch.prompt(sequence, start + tokens),
                    num_computed=start,
                    block_ids=sequence.kv.block_ids,
                )
            )
            work.lengthened.append(sequence.kv)
            room.take_chunk(start, tokens)
            planned = True
        return planned

    @property
    def _to_begin(self) -> bool:
        """Micro-batches of the phase are left."""
        return self._made is not None or bool(self._queue)

    @property
    def _forwarding(self) -> ScheduledMicroBatch | None:
        """The micro-batch whose forward is not through."""
        return next((batch for batch in self._active if not batch.forwarded), None)

    def _begin_next(self) -> ScheduledMicroBatch | None:
        """None without one, or without a free lane: that is free again only in the step after its
        last slices were planned, since in the step itself the forward runs before the slices."""
        if not self._to_begin:
            return None
        used = {batch.lane for batch in (*self._active, *self._retired)}
        lane = next((i for i in range(self.limits.num_lanes) if i not in used), None)
        if lane is None:
            return None
        batch, self._made = self._made or self._make_next(), None
        batch.enter(lane)
        if self._evaluating:
            self.progress.eval_batch_planned(batch.id)
        self._active.append(batch)
        return batch

    def _make_next(self) -> ScheduledMicroBatch:
        self._next_id += 1
        return ScheduledMicroBatch(
            self._next_id,
            self._queue.pop(),
            loss_scale=self._loss_scale,
            train=not self._evaluating,
            kv_prefix=f"{self.lora_id}-",
            grid_of=(self.limits.windows, self._num_layers, self.limits.lowest_layer),
        )

    # ---- optimizer steps and what follows them

    def _start_step(self) -> None:
        if self.step >= self.total_steps or self.progress.out_of_patience:
            self._after_update = True  # a resume found every step done: only publish
            return
        rows, self._next_rows = self._next_rows, None
        if rows is None or rows.step != self.step:
            rows = StepRows.of(self.prepared, self.step)
        self._loss_scale = 1.0 / rows.num_targets
        self.counters.num_tokens += rows.num_targets
        self.counters.num_input_tokens += rows.num_tokens
        self._step_input_tokens = rows.num_tokens
        rate = self.job.training.learning_rate_at(self.step, self.total_steps)
        epoch = self.prepared.order.epoch(self.step + 1)
        self.progress.step_planned(self.step, epoch, rate, rows.num_tokens)
        self._queue = MicroBatchQueue(rows.sequences, self.limits)

    def _close_phase(self, work: PlannedWork, room: Room) -> bool:
        """All micro-batches of the phase are planned: update, evaluate, save, go on."""
        if self._evaluating:
            if self.progress.evaluating:
                return False  # the one place that awaits results: early stopping decides on them
            self._evaluating = False
            return self._finish_step(work, room)
        if self._after_update:
            return self._finish_step(work, room)
        if self.waiting_for_writer:
            return False
        if not room.fit_parameters(Feature.UPDATE, self.limits.adapter_parameters):
            return False
        rate = self.job.training.learning_rate_at(self.step, self.total_steps)
        work.optimizer_step = OptimizerStep(
            step=self.step,
            learning_rate=rate,
            epoch=self.prepared.order.epoch(self.step + 1),
            num_tokens=self.counters.num_tokens,
            num_input_tokens=self.counters.num_input_tokens,
            step_input_tokens=self._step_input_tokens,
        )
        return True

    def _updated(self, work: PlannedWork, room: Room) -> None:
        """What follows the update that `work` holds."""
        self.step += 1
        self._after_update = True
        if self._evaluation_due():
            self._evaluating = True
            validation = self.prepared.validation
            assert validation is not None
            self._queue = MicroBatchQueue(
                (validation[i] for i in range(len(validation))), self.limits
            )
            self.progress.evaluation_planned(self.step, validation.report.targets)
        else:
            self._finish_step(work, room)

    def _evaluation_due(self) -> bool:
        validation = self.job.validation
        if self.prepared.validation is None or validation is None:
            return False
        return self.step % validation.every_steps == 0 or self.step >= self.total_steps

    def _finish_step(self, work: PlannedWork, room: Room) -> bool:
        final = self.step >= self.total_steps or self.progress.out_of_patience
        save = final or self.step % self.job.training.save_steps == 0
        if save and not room.fit_parameters(Feature.SAVE, self.limits.adapter_parameters):
            return False
        self._after_update = False
        if save:
            work.save = SaveRequest(
                step=self.step,
                counters=self.counters.as_dict(),
                final=final,
                evaluations=tuple(self.progress.recent_evaluations),
            )
        if final:
            self.waiting_for_writer = True
            return False
        self._start_step()
        return True

    def _open(self, work: PlannedWork) -> PlannedWork | None:
        """Sent alone and awaited: a batch must not name an adapter that could not be opened."""
        if self._open_sent:
            return None
        self._open_sent = True
        work.open_job = opening(self.prepared, self.limits, self._base_model, self.lora_id)
        return work
