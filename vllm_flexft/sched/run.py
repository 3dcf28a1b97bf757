"""One job in training, as the scheduler sees it: which work comes next.

An optimizer step is a list of micro-batches; each goes forward (chunks) and then backward
(slices); when all are through, the update is planned, then what follows it (evaluation,
checkpoint), then the next step. `plan` takes as much of that as the budget allows. Nothing here
waits for the worker: progress is what was planned.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from vllm_flexft.config import ActivationPolicy, FinetuneJob
from vllm_flexft.data.dataset import TrainingData, TrainingSequence
from vllm_flexft.plan import (
    BackwardSlices,
    Chunk,
    OpenJob,
    OptimizerStep,
    SaveRequest,
    StepPlan,
    StepResult,
)
from vllm_flexft.plan import MicroBatch as MicroBatchSpec
from vllm_flexft.sched.costs import UnitCosts
from vllm_flexft.sched.micro_batch import ScheduledMicroBatch
from vllm_flexft.sched.prepared import PreparedJob
from vllm_flexft.sched.progress import Record, RunProgress
from vllm_flexft.sched.sequence_kv import KVLender

MIN_CHUNK = 16  # tokens; a smaller one costs more in overhead than it moves


@dataclass(frozen=True, slots=True)
class Limits:
    """What a job may take of the engine."""

    window: int
    lane_tokens: int
    num_lanes: int
    max_rows: int  # sequences with chunks in one batch
    lowest_layer: int
    kv_blocks: int  # of each KV-cache group, that a micro-batch of several sequences may hold
    block_size: int  # tokens
    activation_policy: ActivationPolicy
    memory_bytes: float  # for all that training allocates


@dataclass(slots=True)
class Room:
    """What is left of a step after inference; `plan` draws it down."""

    units: float
    tokens: int  # of vLLM's token budget
    rows: int  # of vLLM's request slots
    idle: bool  # no inference in this step: one piece of work may exceed `units`
    sole_job: bool = True  # no other job has work for this step
    may_begin: bool = True  # a micro-batch: not while a job before this one waits for blocks
    spent: float = 0.0

    def take(self, cost: float) -> None:
        self.units -= cost
        self.spent += cost


@dataclass(slots=True)
class PlannedWork:
    """A step plan under construction, with the tokens behind its chunks."""

    begin: list[MicroBatchSpec] = field(default_factory=list)
    chunks: list[Chunk] = field(default_factory=list)
    prompts: list[tuple[list[int], int, tuple[list[int], ...]]] = field(default_factory=list)
    backward: list[BackwardSlices] = field(default_factory=list)
    optimizer_step: OptimizerStep | None = None
    save: SaveRequest | None = None
    refused_blocks: bool = False


class FinetuneRun:
    def __init__(
        self, prepared: PreparedJob, limits: Limits, costs: UnitCosts, base_model: str, lora_id: int
    ) -> None:
        self.prepared, self.limits, self.costs = prepared, limits, costs
        self.lora_id, self._base_model = lora_id, base_model
        self.step = prepared.resume_step  # optimizer steps planned so far
        self.counters = prepared.counters
        self.progress = RunProgress(
            prepared.counters, prepared.job.training.early_stopping_patience
        )
        self.short_of_blocks = False  # and had nothing else to do in its last turn
        self.waiting_for_writer = False  # all is planned; only the final adapter is awaited
        self._opened = self._open_sent = False
        self._next_id = 0
        self._chunk_id = 0
        self._queue: deque[list[TrainingSequence]] = deque()  # micro-batches not yet begun
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
        planned = self._evaluating and not self._queue and not self._active
        return self.progress.on_result(result, all_evaluation_planned=planned)

    # ---- planning

    def plan(
        self, room: Room, lender: KVLender, reclaim: Callable[[], bool] = lambda: False
    ) -> tuple[StepPlan, PlannedWork] | None:
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
            if room.units <= 0 or not self._advance(work, room, lender, reclaim):
                break
        idle = not (work.chunks or work.backward or work.optimizer_step or work.save)
        self.short_of_blocks = idle and work.refused_blocks
        if idle and not self.waiting_for_writer:
            return None
        plan = StepPlan(
            job_id=self.job_id,
            begin=tuple(work.begin),
            chunks=tuple(work.chunks),
            backward=tuple(work.backward),
            optimizer_step=work.optimizer_step,
            save=work.save,
            wait_for_writer=self.waiting_for_writer and room.idle and room.sole_job,
        )
        return plan, work

    def release_blocks(self, lender: KVLender) -> bool:
        """Inference needs memory: the youngest micro-batch with blocks gives them up."""
        return any(batch.release(lender) for batch in reversed(self._retired + self._active))

    def release_all(self, lender: KVLender) -> None:
        while self.release_blocks(lender):
            pass

    def _advance(
        self, work: PlannedWork, room: Room, lender: KVLender, reclaim: Callable[[], bool]
    ) -> bool:
        """Plan one piece: slices of the oldest micro-batch that can run, else chunks, else begin
        the next micro-batch, else close the optimizer step. False when nothing more fits."""
        for batch in self._active:
            if batch.forwarded:
                return self._plan_slices(batch, work, room, lender)
            # In order: a later micro-batch must not starve this one of memory.
            return self._plan_chunks(batch, work, room, lender, reclaim)
        if self._queue:
            return room.may_begin and self._begin_next(work)
        return self._close_phase(work)

    def _plan_slices(
        self, batch: ScheduledMicroBatch, work: PlannedWork, room: Room, lender: KVLender
    ) -> bool:
        count = 0
        while batch.slices_done < batch.grid.num_slices:
            part = batch.grid.slice(batch.slices_done)
            tokens = part.stop - part.start
            top = part.stage == batch.grid.num_layers
            cost = self.costs.loss_slice(tokens) if top else self.costs.layer_slice(tokens)
            if cost > room.units and not (room.idle and room.spent == 0):
                break
            room.take(cost)
            batch.slices_done += 1
            count += 1
        if not count:
            return False
        located, batch.located = batch.located, True
        block_ids = None if located else batch.block_ids(lender)
        work.backward.append(BackwardSlices(batch.spec.id, count, block_ids))
        if batch.finished:
            self._active.remove(batch)
            self._retired.append(batch)
        return batch.finished

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
            rows = min(room.rows, self.limits.max_rows - len(work.chunks))
            tokens = min(sequence.remaining, room.tokens, int(room.units))
            smallest = min(MIN_CHUNK, sequence.remaining)
            if room.idle and room.spent == 0:
                tokens = min(max(tokens, smallest), room.tokens)
            if rows <= 0 or tokens < smallest:
                break
            start = sequence.kv.num_tokens
            while not (extended := lender.extend(sequence.kv, tokens)):
                if not reclaim():
                    break
            if not extended:
                work.refused_blocks = True
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
            # One token more than is computed: vLLM then takes the chunk for a part of a longer
            # prompt and samples nothing for it.
            prompt = [*sequence.token_ids[: start + tokens], sequence.token_ids[-1]]
            work.prompts.append((prompt, start, lender.block_ids(sequence.kv)))
            room.tokens -= tokens
            room.rows -= 1
            room.take(tokens)
            planned = True
        return planned

    def _begin_next(self, work: PlannedWork) -> bool:
        """A lane is free again only in the step after its last slices were planned: in the step
        itself the forward runs before the slices."""
        used = {batch.lane for batch in (*self._active, *self._retired)}
        lane = next((i for i in range(self.limits.num_lanes) if i not in used), None)
        if lane is None:
            return False
        self._next_id += 1
        if self._evaluating:
            self.progress.eval_batch_planned(self._next_id)
        self._active.append(
            ScheduledMicroBatch(
                self._next_id,
                self._queue.popleft(),
                step=self.step,
                lane=lane,
                loss_scale=self._loss_scale,
                train=not self._evaluating,
                kv_prefix=f"{self.lora_id}-",
                grid_of=(self.limits.window, self.costs.num_layers, self.limits.lowest_layer),
            )
        )
        return True

    # ---- optimizer steps and what follows them

    def _start_step(self) -> None:
        if self.step >= self.total_steps or self.progress.out_of_patience:
            self._after_update = True  # a resume found every step done: only publish
            return
        rows = self.prepared.order.rows(self.step)
        sequences = [self.prepared.train[row] for row in rows]
        targets = sum(s.num_targets for s in sequences)
        tokens = sum(len(s.token_ids) for s in sequences)
        self._loss_scale = 1.0 / targets
        self.counters.num_tokens += targets
        self.counters.num_input_tokens += tokens
        self._step_input_tokens = tokens
        rate = self.job.training.learning_rate_at(self.step, self.total_steps)
        epoch = self.prepared.order.epoch(self.step + 1)
        self.progress.step_planned(self.step, epoch, rate, tokens)
        self._queue = self._micro_batches(sequences)

    def _micro_batches(
        self, sequences: Iterable[TrainingSequence]
    ) -> deque[list[TrainingSequence]]:
        """Consecutive sequences, as many as fit a lane and the micro-batch's part of the KV cache;
        a sequence that is too long for that part goes alone."""
        groups: deque[list[TrainingSequence]] = deque()
        limits, room, blocks = self.limits, 0, 0
        for sequence in sequences:
            length = len(sequence.token_ids)
            need = -(-length // limits.block_size)
            if length > room or need > blocks or len(groups[-1]) >= limits.max_rows:
                groups.append([])
                room, blocks = limits.lane_tokens, limits.kv_blocks
            groups[-1].append(sequence)
            room -= length
            blocks -= need
        return groups

    def _close_phase(self, work: PlannedWork) -> bool:
        """All micro-batches of the phase are planned: update, evaluate, save, go on."""
        if self._evaluating:
            if self.progress.evaluating:
                return False  # the one place that awaits results: early stopping decides on them
            self._evaluating = False
            return self._finish_step(work)
        if self._after_update:
            return self._finish_step(work)
        if self.waiting_for_writer:
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
        self.step += 1
        self._after_update = True
        if self._evaluation_due():
            self._evaluating = True
            assert self.prepared.validation is not None
            rows = list(_all(self.prepared.validation))
            self._queue = self._micro_batches(rows)
            self.progress.evaluation_planned(self.step, sum(s.num_targets for s in rows))
            return True
        return self._finish_step(work)

    def _evaluation_due(self) -> bool:
        validation = self.job.validation
        if self.prepared.validation is None or validation is None:
            return False
        return self.step % validation.every_steps == 0 or self.step >= self.total_steps

    def _finish_step(self, work: PlannedWork) -> bool:
        self._after_update = False
        final = self.step >= self.total_steps or self.progress.out_of_patience
        if final or self.step % self.job.training.save_steps == 0:
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

    def _open(self, work: PlannedWork) -> tuple[StepPlan, PlannedWork] | None:
        """Sent alone and awaited: a batch must not name an adapter that could not be opened."""
        if self._open_sent:
            return None
        self._open_sent = True
        limits, prepared = self.limits, self.prepared
        setup = OpenJob(
            job_id=prepared.job_id,
            job=prepared.job,
            config_hash=prepared.config_hash,
            output_dir=str(prepared.output_dir),
            base_model=self._base_model,
            lora_int_id=self.lora_id,
            window=limits.window,
            lane_tokens=limits.lane_tokens,
            num_lanes=limits.num_lanes,
            activation_policy=limits.activation_policy,
            memory_bytes=limits.memory_bytes,
            resume_from=str(prepared.resume_from) if prepared.resume_from else None,
        )
        return StepPlan(job_id=self.job_id, open_job=setup), work


def _all(data: TrainingData) -> Iterable[TrainingSequence]:
    return (data[i] for i in range(len(data)))
