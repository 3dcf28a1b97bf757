"""The order of a job's work, against a worker that only keeps books."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from harness.rooms import unit_room
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vllm_flexft.plan import EvaluationLoss, MicroBatch, StepPlan, StepResult, Windows, Written
from vllm_flexft.sched.costs import UnitCosts
from vllm_flexft.sched.prepared import PreparedJob
from vllm_flexft.sched.progress import EvalRecord, StepRecord
from vllm_flexft.sched.room import Limits, PlannedWork, Room
from vllm_flexft.sched.run import FinetuneRun
from vllm_flexft.sched.sequence_kv import KVLender

LAYERS, WINDOW, LOSS_WINDOW, LANE, MAX_ROWS, BLOCK = 3, 32, 20, 128, 4, 16
COSTS = UnitCosts(num_layers=LAYERS, layer_parameters=1000, head_parameters=500)


class BookKeeper:
    """Plays the worker: checks that each plan follows from those before it."""

    def __init__(self, prepared: PreparedJob, eval_losses: list[float] | None = None) -> None:
        self.prepared = prepared
        self.eval_losses = eval_losses or []
        self.batches: dict[int, MicroBatch] = {}
        self.filled: dict[int, set[int]] = {}  # micro-batch -> rows of its lane
        self.slices: dict[int, int] = {}
        self.finished: list[MicroBatch] = []
        self.rows_of_step: list[list[tuple[int, ...]]] = [[]]
        self.updates: list[int] = []
        self.saves: list[tuple[int, bool]] = []
        self.opened = False

    def num_slices(self, batch: MicroBatch) -> int:
        layers = LAYERS if batch.train else 0
        return -(-batch.num_tokens // LOSS_WINDOW) + layers * -(-batch.num_tokens // WINDOW)

    def run(self, plan: StepPlan, work: PlannedWork) -> StepResult:
        if plan.open_job is not None:
            assert not plan.chunks
            assert not plan.backward
            assert not self.opened
            self.opened = True
            return StepResult("job", opened=True)
        assert self.opened
        for batch in plan.begin:
            assert batch.num_tokens <= LANE
            assert batch.lane not in {b.lane for b in self.batches.values()}, "lane in use"
            self.batches[batch.id] = batch
            self.filled[batch.id], self.slices[batch.id] = set(), 0
        by_lane = {batch.lane: batch for batch in self.batches.values()}
        for chunk, prompt in zip(plan.chunks, work.prompts, strict=True):
            batch = by_lane[chunk.lane]
            end = prompt.num_computed + chunk.num_tokens
            assert len(prompt.token_ids) == end + 1, "must look like part of a longer prompt"
            lane_row = chunk.row - prompt.num_computed
            assert lane_row in batch.offsets
            assert (prompt.token_ids[:end] == batch.token_ids[lane_row : lane_row + end]).all()
            assert len(prompt.block_ids[0]) >= -(-end // BLOCK)
            self.filled[batch.id].update(range(chunk.row, chunk.row + chunk.num_tokens))
        evaluated = []
        for part in plan.backward:
            batch = self.batches[part.micro_batch]
            assert self.filled[batch.id] == set(range(batch.num_tokens)), "not all was forwarded"
            self.slices[batch.id] += part.count
            assert self.slices[batch.id] <= self.num_slices(batch)
            if self.slices[batch.id] == self.num_slices(batch):
                if (evaluation := self.finish(batch)) is not None:
                    evaluated.append(evaluation)
        if plan.optimizer_step is not None:
            assert not any(batch.train for batch in self.batches.values()), "update too early"
            self.updates.append(plan.optimizer_step.step)
            self.rows_of_step.append([])
        written: tuple[Written, ...] = ()
        if plan.save is not None:
            self.saves.append((plan.save.step, plan.save.final))
            written = (Written(plan.save.step, "folder", plan.save.final),)
        step = plan.optimizer_step
        return StepResult(
            "job", evaluated=tuple(evaluated), written=written,
            updated_step=None if step is None else step.step, loss=2.0, grad_norm=1.0,
        )  # fmt: skip

    def finish(self, batch: MicroBatch) -> EvaluationLoss | None:
        del self.batches[batch.id]
        self.finished.append(batch)
        pairs = list(zip(batch.offsets, batch.offsets[1:], strict=False))
        targets = int(batch.supervised.sum())
        if batch.train:
            self.rows_of_step[-1] += [tuple(batch.token_ids[a:b].tolist()) for a, b in pairs]
            return None
        loss = self.eval_losses[len(self.updates) - 1] if self.eval_losses else 3.0
        return EvaluationLoss(batch.id, loss * targets, targets // 2)


def new_run(prepared: PreparedJob, kv_blocks: int = 64) -> FinetuneRun:
    limits = Limits(
        windows=Windows(layer=WINDOW, loss=LOSS_WINDOW),
        lane_tokens=LANE,
        num_lanes=2,
        max_rows=MAX_ROWS,
        lowest_layer=prepared.lowest_layer,
        kv_blocks=kv_blocks,
        block_size=BLOCK,
        activation_policy="fast",
        memory_bytes=1e9,
    )
    return FinetuneRun(prepared, limits, LAYERS, "model", 7)


def plan_step(
    run: FinetuneRun, room: Room, lender: KVLender
) -> tuple[StepPlan, PlannedWork] | None:
    work = run.draw(room, lender)
    return None if work is None else (run.commit(work, room), work)


def drive(
    run: FinetuneRun,
    keeper: BookKeeper,
    lender: KVLender,
    room: Callable[[int], Room],
    before_step: Callable[[int], None] = lambda step: None,
    delay: int = 0,
    prepared: Callable[[int], bool] = lambda step: False,
    ahead: Callable[[int], bool | None] = lambda step: None,
) -> list[Any]:
    """Plan and run steps until the final adapter is written; results come `delay` steps later, as
    with vLLM's asynchronous scheduling. `prepared`: whether the next plan is, in that step.
    `ahead`: whether the next step's work is drawn in that step, and then (True) sent, or (False)
    taken back and drawn for another room."""
    records: list[Any] = []
    late: list[StepResult] = []
    drawn: tuple[PlannedWork, Room, tuple[Any, ...]] | None = None
    for step in range(5000):
        if drawn is None:
            before_step(step)
            given_room = room(step)
            limits = _limits(given_room)
            work = run.draw(given_room, lender)
        else:
            (work, given_room, limits), drawn = drawn, None
        tokens, rows, units, idle = limits
        if work is not None:
            plan = run.commit(work, given_room)
            assert sum(chunk.num_tokens for chunk in plan.chunks) <= tokens
            assert len(plan.chunks) <= min(rows, MAX_ROWS)
            assert idle or given_room.spent <= units + 1e-9
            late.append(keeper.run(plan, work))
        if prepared(step):
            run.prepare(lender)
        if (sent := ahead(step)) is not None and run.foreseeable:
            next_room = room(step + 1)
            limits = _limits(next_room)
            if (drawn_work := run.draw(next_room, lender)) is not None:
                if sent:
                    drawn = drawn_work, next_room, limits
                else:
                    run.take_back(drawn_work)
        while len(late) > delay or (work is None and late):
            records += run.on_result(late.pop(0))
        if any(getattr(r, "written", None) and r.written.final for r in records):
            return records
    raise AssertionError(f"not done: step {run.step}, {len(keeper.finished)} micro-batches")


def _limits(room: Room) -> tuple[int, int, float, bool]:
    return room.tokens, room.rows, room.seconds, room.idle


def plenty(step: int) -> Room:
    return unit_room(1e9, tokens=512, rows=8, idle=True, costs=COSTS)


lengths = st.lists(st.integers(2, 100), min_size=1, max_size=10)
rooms = st.lists(
    st.tuples(
        st.sampled_from([0.0, 0.5, 3.0, 20.0, 70.0, 1e6]), st.integers(0, 90),
        st.integers(0, 5), st.booleans(),
    ),
    min_size=1, max_size=12,
)  # fmt: skip


@settings(
    derandomize=True, max_examples=80, deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip
@given(
    lengths, rooms, st.lists(st.integers(0, 200), max_size=20), st.sampled_from([0, 1]),
    st.sampled_from([0, 1, 3]), st.lists(st.sampled_from([None, True, False]), max_size=9),
)  # fmt: skip
def test_every_step_trains_on_its_rows_once_whatever_the_load(
    prepare: Any, make_manager: Any, lengths: list, rooms: list, releases: list, delay: int,
    prepared_every: int, ahead: list,
) -> None:  # fmt: skip
    """Random rooms and random memory pressure, with steps drawn ahead: rows, order, updates and
    blocks come out right."""
    prepared = prepare(lengths, valid=[30, 20], every_steps=2, save_steps=2, max_steps=4)
    manager = make_manager(20)
    free = manager.block_pool.get_num_free_blocks()
    lender = KVLender(manager, reserved_blocks=2)
    run, keeper = new_run(prepared, kv_blocks=18), BookKeeper(prepared)

    def release(step: int) -> None:
        if step in releases:
            run.release_blocks(lender)

    def room(step: int) -> Room:
        units, tokens, rows, idle = rooms[step % len(rooms)]
        if step % 7 == 6:  # progress must be possible
            return plenty(step)
        return unit_room(units, tokens=tokens, rows=rows, idle=idle, costs=COSTS)

    def prepared_in(step: int) -> bool:
        return prepared_every > 0 and step % prepared_every == 0

    def drawn_in(step: int) -> bool | None:
        return ahead[step % len(ahead)] if ahead else None

    records = drive(run, keeper, lender, room, release, delay, prepared_in, drawn_in)

    assert keeper.updates == [0, 1, 2, 3]
    for step in range(4):
        expected = [prepared.train[row].token_ids.tolist() for row in prepared.order.rows(step)]
        assert sorted(keeper.rows_of_step[step]) == sorted(map(tuple, expected))
        # the loss is the mean over the step's supervised tokens, whatever the micro-batches
        targets = sum(prepared.train[row].num_targets for row in prepared.order.rows(step))
        assert {round(1 / b.loss_scale) for b in keeper.finished if b.train} >= {targets}
    assert keeper.saves == [(2, False), (4, True)]
    losses = [record for record in records if isinstance(record, StepRecord)]
    assert [record.step for record in losses] == [1, 2, 3, 4]
    assert all(abs(record.loss - 2.0) < 1e-9 for record in losses)
    evals = [record for record in records if isinstance(record, EvalRecord)]
    assert [(record.step, round(record.loss, 9)) for record in evals] == [(2, 3.0), (4, 3.0)]
    while run.release_blocks(lender):
        pass
    assert manager.block_pool.get_num_free_blocks() == free


def test_what_is_prepared_is_what_would_have_been_planned(prepare: Any, make_manager: Any) -> None:
    """Two runs of the same job, one of them prepared after each plan."""
    prepared = [prepare([20, 70, 5, 33, 90, 12], valid=[30], max_steps=4) for _ in range(2)]
    runs = [(new_run(one), KVLender(make_manager(64), 2), BookKeeper(one)) for one in prepared]
    finals = 0
    for step in range(200):
        told = []
        for ahead, (run, lender, keeper) in enumerate(runs):
            planned = plan_step(
                run, unit_room(40.0 + step % 3, tokens=40, rows=2, idle=False, costs=COSTS), lender
            )
            if ahead:
                run.prepare(lender)
            if planned is None:
                told.append(None)
                continue
            plan, work = planned
            tokens = [prompt.token_ids.tolist() for prompt in work.prompts]
            slices = [(part.micro_batch, part.count) for part in plan.backward]
            begun = [(batch.id, batch.lane, batch.offsets, batch.train) for batch in plan.begin]
            save = None if plan.save is None else (plan.save.step, plan.save.final)
            told.append((begun, plan.chunks, tokens, slices, plan.optimizer_step, save))
            run.on_result(keeper.run(plan, work))
            finals += plan.save is not None and plan.save.final
        assert told[0] == told[1]
        if finals == 2:
            return
    raise AssertionError("not done")


def test_what_was_taken_back_is_drawn_again_as_if_it_had_never_been(
    prepare: Any, make_manager: Any
) -> None:
    """Two runs of the same job; before each step of one of them another step is drawn for it, with
    a room of another size, and taken back."""
    prepared = [prepare([20, 70, 5, 33, 90, 12], valid=[30], max_steps=4) for _ in range(2)]
    runs = [(new_run(one), KVLender(make_manager(64), 2), BookKeeper(one)) for one in prepared]
    finals = taken_back = 0
    for step in range(200):
        told = []
        for disturbed, (run, lender, keeper) in enumerate(runs):
            if disturbed and run.foreseeable:
                other = unit_room(
                    (11.0, 90.0, 1e6)[step % 3], tokens=90, rows=4, idle=False, costs=COSTS
                )
                if (work := run.draw(other, lender)) is not None:
                    run.take_back(work)
                    taken_back += 1
            planned = plan_step(
                run, unit_room(40.0 + step % 3, tokens=40, rows=2, idle=False, costs=COSTS), lender
            )
            if planned is None:
                told.append(None)
                continue
            plan, work = planned
            tokens = [prompt.token_ids.tolist() for prompt in work.prompts]
            slices = [(p.micro_batch, p.count, p.block_ids is None) for p in plan.backward]
            begun = [(batch.id, batch.lane, batch.offsets, batch.train) for batch in plan.begin]
            chunks = [(c.lane, c.row, c.num_tokens) for c in plan.chunks]
            save = None if plan.save is None else (plan.save.step, plan.save.final)
            told.append((begun, chunks, tokens, slices, plan.optimizer_step, save))
            run.on_result(keeper.run(plan, work))
            finals += plan.save is not None and plan.save.final
        assert told[0] == told[1]
        if finals == 2:
            assert taken_back > 20
            return
    raise AssertionError("not done")


def test_the_next_plan_neither_allocates_nor_reads_rows_once_it_is_prepared(
    prepare: Any, make_manager: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared, manager = prepare([60] * 8, max_steps=2), make_manager(64)
    run, lender, keeper = new_run(prepared), KVLender(manager, 0), BookKeeper(prepared)

    def one() -> Room:
        return unit_room(1e9, tokens=60, rows=8, idle=False, costs=COSTS)

    for room in (plenty(0), one()):
        planned = plan_step(run, room, lender)
        assert planned is not None
        run.on_result(keeper.run(*planned))
    free = manager.block_pool.get_num_free_blocks()
    run.prepare(lender)
    assert manager.block_pool.get_num_free_blocks() < free

    def not_now(*_: Any, **__: Any) -> None:
        raise AssertionError("while the worker waits")

    monkeypatch.setattr(manager, "allocate_slots", not_now)
    monkeypatch.setattr(type(prepared.train), "__getitem__", not_now)
    planned = plan_step(run, one(), lender)
    assert planned is not None
    assert planned[0].chunks


def test_what_was_borrowed_ahead_goes_back_first_and_the_forward_stays(
    prepare: Any, make_manager: Any
) -> None:
    prepared, manager = prepare([60] * 8, max_steps=2), make_manager(64)
    run, lender, keeper = new_run(prepared), KVLender(manager, 0), BookKeeper(prepared)
    rooms = (plenty(0), unit_room(1e9, tokens=60, rows=8, idle=False, costs=COSTS))
    for room in rooms:
        planned = plan_step(run, room, lender)
        assert planned is not None
        run.on_result(keeper.run(*planned))
    held = lender.num_blocks
    run.prepare(lender)
    assert run.release_blocks(lender)
    assert lender.num_blocks == held
    run.prepare(lender)
    assert lender.num_blocks == held, "not while inference needs blocks"


def test_nothing_is_borrowed_ahead_while_no_chunks_fit(prepare: Any, make_manager: Any) -> None:
    manager = make_manager(64)
    run, lender = new_run(prepare([60] * 4)), KVLender(manager, 0)
    plan_step(run, plenty(0), lender)
    run.on_result(StepResult("job", opened=True))
    for _ in range(3):
        assert (
            plan_step(run, unit_room(0.0, tokens=512, rows=8, idle=False, costs=COSTS), lender)
            is None
        )
        run.prepare(lender)
        assert manager.block_pool.get_num_free_blocks() == 64


def test_short_sequences_share_a_micro_batch(prepare: Any, make_manager: Any) -> None:
    run, keeper = new_run(prepared := prepare([20] * 4, max_steps=1)), BookKeeper(prepare([20]))
    keeper.prepared = prepared
    drive(run, keeper, KVLender(make_manager(64), 0), plenty)
    assert [batch.offsets for batch in keeper.finished] == [(0, 20, 40, 60, 80)]


def test_micro_batches_keep_to_their_part_of_the_cache(prepare: Any, make_manager: Any) -> None:
    """Four sequences of two blocks each; three blocks a micro-batch."""
    prepared = prepare([20] * 4, max_steps=1)
    run, keeper = new_run(prepared, kv_blocks=3), BookKeeper(prepared)
    drive(run, keeper, KVLender(make_manager(64), 0), plenty)
    assert [batch.offsets for batch in keeper.finished] == [(0, 20)] * 4


def test_a_sequence_longer_than_that_part_goes_alone(prepare: Any, make_manager: Any) -> None:
    prepared = prepare([10, 100, 10], max_steps=1)
    run, keeper = new_run(prepared, kv_blocks=3), BookKeeper(prepared)
    drive(run, keeper, KVLender(make_manager(64), 0), plenty)
    assert [batch.offsets for batch in keeper.finished] == [(0, 10), (0, 100), (0, 10)]


def test_no_room_means_no_plan(prepare: Any, make_manager: Any) -> None:
    run, lender = new_run(prepare([20])), KVLender(make_manager(64), 0)
    plan_step(run, plenty(0), lender)
    run.on_result(StepResult("job", opened=True))
    assert (
        plan_step(run, unit_room(0.0, tokens=512, rows=8, idle=False, costs=COSTS), lender) is None
    )
    assert plan_step(run, unit_room(1e9, tokens=0, rows=8, idle=False, costs=COSTS), lender) is None
    assert (
        plan_step(run, unit_room(1e9, tokens=512, rows=0, idle=False, costs=COSTS), lender) is None
    )
    assert (
        plan_step(run, unit_room(1e9, tokens=512, rows=8, idle=False, costs=COSTS), lender)
        is not None
    )


def test_nothing_is_planned_before_the_job_is_open(prepare: Any, make_manager: Any) -> None:
    run, lender = new_run(prepare([20])), KVLender(make_manager(64), 0)
    first = plan_step(run, plenty(0), lender)
    assert first is not None
    assert first[0].open_job is not None
    assert plan_step(run, plenty(1), lender) is None


def test_release_takes_blocks_of_the_youngest_micro_batch_first(
    prepare: Any, make_manager: Any
) -> None:
    prepared = prepare([100, 100], max_steps=1)
    manager = make_manager(64)
    run, lender = new_run(prepared), KVLender(manager, 0)
    keeper = BookKeeper(prepared)
    plan = plan_step(run, plenty(0), lender)
    assert plan is not None
    run.on_result(keeper.run(*plan))
    plan = plan_step(run, unit_room(100, tokens=512, rows=8, idle=False, costs=COSTS), lender)
    assert plan is not None
    held = 64 - manager.block_pool.get_num_free_blocks()
    assert held == 7  # 100 tokens
    assert run.release_blocks(lender)
    assert manager.block_pool.get_num_free_blocks() == 64
    assert not run.release_blocks(lender)


def test_early_stopping_ends_the_run_after_patience_evaluations(
    prepare: Any, make_manager: Any
) -> None:
    prepared = prepare(
        [20] * 4, valid=[30], every_steps=1, max_steps=50, early_stopping_patience=2, save_steps=9
    )
    run = new_run(prepared)
    keeper = BookKeeper(prepared, eval_losses=[3.0, 2.0, 2.5, 1.9, 2.0, 1.9, 1.0])
    drive(run, keeper, KVLender(make_manager(64), 0), plenty, delay=1)
    assert keeper.updates == list(range(6))  # 1.9 is the best; 2.0 and 1.9 are no better
    assert keeper.saves == [(6, True)]


def test_a_resumed_run_with_every_step_done_only_publishes(prepare: Any, make_manager: Any) -> None:
    prepared = prepare([20] * 4, max_steps=3)
    prepared.resume_step = 3
    run, keeper = new_run(prepared), BookKeeper(prepared)
    drive(run, keeper, KVLender(make_manager(64), 0), plenty)
    assert keeper.updates == []
    assert keeper.saves == [(3, True)]
