"""Work that is drawn ahead of its step, in the real scheduler without a model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from harness.rooms import unit_prices

from benchmarks.bare_scheduler import BareEngine, prepared_job
from vllm_flexft.plan import PLAN_ATTRIBUTE
from vllm_flexft.sched.pacer import Pacer
from vllm_flexft.sched.planner import Budget, StepLoad
from vllm_flexft.sched.room import Room
from vllm_flexft.sched.starvation import StarvationLog


def make_engine(folder: Path, **options: Any) -> BareEngine:
    return BareEngine(
        folder / "model", blocks=800, max_num_seqs=16, max_model_len=1024,
        options={"tpot_ms": 1000, **options},
    )  # fmt: skip


def endless_job(folder: Path, save_steps: int = 10**6) -> Any:
    lengths = np.random.default_rng(0).integers(8, 300, 2000)
    return prepared_job(lengths, folder / "out", max_steps=10**6, save_steps=save_steps)


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[BareEngine]:
    engine = make_engine(tmp_path)
    engine.train(endless_job(tmp_path))
    yield engine
    engine.close()


@pytest.fixture
def drawn_late(monkeypatch: pytest.MonkeyPatch) -> list[StepLoad]:
    """The loads of steps whose work was drawn when they were scheduled."""
    loads: list[StepLoad] = []
    room = Pacer.room

    def counted(self: Pacer, now: float, load: StepLoad, **kwargs: int) -> object:
        loads.append(load)
        return room(self, now, load, **kwargs)

    monkeypatch.setattr(Pacer, "room", counted)
    return loads


def test_while_nobody_comes_or_goes_work_is_drawn_ahead(
    engine: BareEngine, drawn_late: list[StepLoad]
) -> None:
    for _ in range(4):
        engine.ask(20, max_tokens=400)
    for _ in range(60):
        engine.step()
    drawn_late.clear()
    before = engine.worker.tokens
    for _ in range(200):
        engine.step()
    assert len(drawn_late) <= 10
    assert engine.worker.tokens - before > 200 * 16


def test_a_step_with_a_new_request_gets_what_is_drawn_for_it(
    engine: BareEngine, drawn_late: list[StepLoad]
) -> None:
    engine.ask(20, max_tokens=400)
    for _ in range(60):
        engine.step()
    drawn_late.clear()
    engine.ask(50, max_tokens=10)
    engine.step()
    assert [load.prefill_tokens for load in drawn_late] == [50]


def test_work_drawn_ahead_is_taken_back_before_a_pause_gives_up_all_blocks(
    engine: BareEngine,
) -> None:
    from vllm.v1.core.sched.interface import PauseState

    scheduler = engine.scheduler
    for _ in range(60):
        engine.step()
    assert scheduler._drafts._next is not None
    scheduler.set_pause_state(PauseState.PAUSED_ALL)
    assert scheduler._drafts._next is None
    assert scheduler._lender.num_blocks == 0
    scheduler.set_pause_state(PauseState.UNPAUSED)
    before = engine.worker.updates
    for _ in range(300):
        engine.step()
    assert engine.worker.updates > before


def test_the_load_foreseen_covers_a_step_in_which_each_request_has_one_token_more() -> None:
    load = StepLoad(decode_rows=3, prefill_tokens=40, context=160, num_requests=4)
    foreseen = load.next(16)
    assert foreseen is not None
    assert foreseen.covers(StepLoad(4, 0, 160 + 4 * 16, num_requests=4))
    assert StepLoad(num_waiting=1, num_requests=1).next(16) is None
    assert StepLoad(3, num_waiting=1, num_requests=4).next(16) is None
    assert StepLoad().next(16) == StepLoad()


def test_what_is_drawn_twice_is_sent_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two engines, one of which is asked for its bitmask twice a step."""
    monkeypatch.setattr(Pacer, "room", _room_of_one_size)
    monkeypatch.setattr(Pacer, "room_ahead", _room_of_one_size)
    sent: list[list[Any]] = [[], []]
    for twice in (0, 1):
        engine = make_engine(tmp_path / str(twice))
        engine.train(endless_job(tmp_path / str(twice)))
        scheduler = engine.scheduler
        for _ in range(80):
            output = engine.step(scheduler.get_grammar_bitmask if twice else lambda output: None)
            sent[twice] += [
                (chunk.row, chunk.num_tokens)
                for plan in getattr(output, PLAN_ATTRIBUTE, ())
                for chunk in plan.chunks
            ]
        engine.close()
    assert len(sent[0]) > 40
    assert sent[0] == sent[1]


def _room_of_one_size(
    self: Pacer, now: float, load: StepLoad, *, tokens: int, rows: int, sole_job: bool = True
) -> Room:
    idle = not load.num_tokens
    budget = Budget(600.0, 0.0, 600.0, 0.0, 0.0, idle)
    prices = unit_prices(self.model.prior)
    return Room(budget, prices, tokens=tokens, rows=rows, sole_job=sole_job)


def test_a_job_is_charged_for_all_of_its_work_snapshots_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    charged, spent, saves = [], [], 0
    engine = make_engine(tmp_path)
    engine.train(endless_job(tmp_path, save_steps=1))
    planned = Pacer.planned

    def noted(self: Pacer, key: Any, now: float, load: StepLoad, room: Any, **rest: Any) -> None:
        spent.append(room.spent if room is not None else 0.0)
        planned(self, key, now, load, room, **rest)

    monkeypatch.setattr(Pacer, "planned", noted)
    monkeypatch.setattr(
        engine.scheduler._runs, "charge", lambda seconds: charged.append(sum(seconds.values()))
    )
    engine.step()  # the job's opening
    charged.clear()
    spent.clear()
    for _ in range(200):
        output = engine.step()
        saves += any(plan.save for plan in getattr(output, PLAN_ATTRIBUTE, ()))
    engine.close()
    assert saves > 10
    assert charged == pytest.approx(spent)


def test_a_job_that_gets_nothing_while_another_does_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    monkeypatch.setattr(
        StarvationLog, "postponed", lambda self, now, job, reason: told.append(reason)
    )
    engine = make_engine(tmp_path, max_jobs_at_once=2)
    first, second = endless_job(tmp_path), endless_job(tmp_path / "second")
    second.job_id = "second"
    engine.train(first)
    engine.train(second)
    for _ in range(40):
        engine.step()
    starved = engine.scheduler._runs.get("second")

    def refused(work: Any, room: Room, *_: Any) -> bool:
        room.lacking = "the stars"
        return False

    monkeypatch.setattr(starved, "_advance", refused)
    told.clear()
    for _ in range(40):
        engine.step()
    engine.close()
    assert told.count("the stars") >= 39
