"""Work that is drawn ahead of its step, in the real scheduler without a model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from benchmarks.bare_scheduler import BareEngine, prepared_job
from vllm_flexft.sched.pacer import Pacer
from vllm_flexft.sched.planner import StepLoad


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[BareEngine]:
    engine = BareEngine(
        tmp_path / "model", blocks=800, max_num_seqs=16, max_model_len=1024,
        options={"tpot_ms": 1000},
    )  # fmt: skip
    lengths = np.random.default_rng(0).integers(8, 300, 2000)
    engine.train(prepared_job(lengths, tmp_path / "out", max_steps=10**6, save_steps=10**6))
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
