"""The loop of planning and learning, without an engine: its time is the plant's."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from harness.plant import COSTS, PRIOR, Plant

from vllm_flexft.sched.latency import Feature, LatencyModel
from vllm_flexft.sched.pacer import Pacer
from vllm_flexft.sched.planner import TTFT_SHARE, Objectives, StepLoad
from vllm_flexft.sched.room import Room
from vllm_flexft.sched.trace import StepTrace

TPOT_S = 0.050
DECODE = StepLoad(decode_rows=8, context=4000)
IDLE = StepLoad()


class Server:
    """Steps one after the other, each filled with finetune work as far as it fits."""

    def __init__(self, pacer: Pacer, plant: Plant) -> None:
        self.pacer, self.plant = pacer, plant
        self.now, self.count = 100.0, 0

    def step(self, load: StepLoad) -> tuple[float, float]:
        """Its seconds, and finetune tokens in it."""
        self.count += 1
        room = self.pacer.room(self.now, load, tokens=2048, rows=8)
        if tokens := room.fit_chunk(0, 10**6, 16):
            room.take_chunk(0, tokens)
        scheduled = self.now
        self.pacer.planned(self.count, scheduled, load, room)
        features = load.features() + room.features
        features[Feature.STEP] = min(1.0, features[Feature.STEP])
        seconds = self.plant.seconds(features) if features.any() else 1e-4
        self.now += seconds
        self.pacer.finished(self.count, self.now)
        return seconds, tokens


def new(noise: float = 0.03, **kwargs: object) -> Server:
    plant = Plant(noise=noise)
    return Server(Pacer(LatencyModel(PRIOR), Objectives(TPOT_S), **kwargs), plant)  # type: ignore[arg-type]


def test_steady_decoding_is_filled_up_to_the_objective_and_not_over_it():
    server = new()
    steps = [server.step(DECODE) for _ in range(300)]
    seconds = np.array([s for s, _ in steps[20:]])
    assert np.mean(seconds > TPOT_S) < 0.01
    assert np.mean(seconds) > 0.75 * TPOT_S
    assert min(tokens for _, tokens in steps[20:]) > 0


def test_the_first_steps_keep_the_objective_too():
    server = new()
    assert all(server.step(DECODE)[0] <= TPOT_S for _ in range(20))


def test_idle_steps_take_their_part_of_the_first_token_objective_on_average():
    server = new()
    seconds = np.array([server.step(IDLE)[0] for _ in range(60)])
    assert np.mean(seconds[10:]) == pytest.approx(TTFT_SHARE * 5.0, rel=0.05)
    assert max(seconds[10:]) < 1.25 * TTFT_SHARE * 5.0
    assert max(seconds[:10]) < 2 * TTFT_SHARE * 5.0


def test_overload_ends_finetuning_at_once_and_it_comes_back_by_itself():
    server = new()
    for _ in range(50):
        server.step(DECODE)
    overload = StepLoad(64, 0, 30000, num_waiting=20)
    assert [server.step(overload)[1] for _ in range(20)] == [0] * 20
    assert server.step(DECODE)[1] > 0


def test_a_burst_of_decoding_returns_under_the_objective_within_five_steps():
    server = new()
    for _ in range(100):
        server.step(DECODE)
    burst = StepLoad(decode_rows=60, context=40_000)  # 22 ms alone
    assert all(server.step(burst)[0] <= TPOT_S for _ in range(50)[5:])


def test_a_slower_clock_costs_at_most_a_few_steps_over_the_objective():
    server = new()
    for _ in range(200):
        server.step(DECODE)
    server.plant.slowness = 2.0
    over = [server.step(DECODE)[0] > TPOT_S for _ in range(50)]
    assert sum(over) <= 8
    assert not any(over[20:])


def test_work_that_is_thought_too_long_is_tried_now_and_then():
    """A run of slow steps made the model believe that chunks cost four times as much."""
    server = new()
    for _ in range(200):
        server.step(DECODE)
    state = server.pacer.model.state()
    state["theta"][Feature.CHUNK] *= 4
    server.pacer.model.restore(state)
    price = server.pacer.model.prices()[Feature.CHUNK]
    server.pacer.objectives = Objectives((0.0135 + 8 * price) / 0.9)  # half a smallest chunk
    tokens = [server.step(DECODE)[1] for _ in range(8000)]
    assert tokens[50] == 0
    assert tokens[-1] > 0


def test_work_that_is_too_long_is_tried_rarely():
    """It was measured: the price is right, and the objective is more important."""
    server = new()
    for _ in range(200):
        server.step(DECODE)
    known = server.pacer.model.prices()[Feature.CHUNK]
    server.pacer.objectives = Objectives((0.0135 + 8 * known) / 0.9)  # half a smallest chunk
    seconds = np.array([server.step(DECODE)[0] for _ in range(3000)])
    assert np.mean(seconds > server.pacer.objectives.tpot_s) < 0.01


@pytest.mark.parametrize("ahead", [1, 2])
def test_steps_that_are_scheduled_ahead_are_timed_from_one_finish_to_the_next(ahead: int):
    """vLLM's asynchronous scheduling: the next step is planned while this one runs."""
    pacer = Pacer(LatencyModel(PRIOR), Objectives(), StepTrace())
    for step in range(30):
        pacer.planned(step, 0.010 * (step - ahead), DECODE, None)
        pacer.finished(step, 0.010 * (step + 1))
    assert pacer.trace is not None
    actual = pacer.trace.records()["actual"]
    assert np.allclose(actual[2:], 0.010, atol=1e-6)


def test_time_between_steps_counts_unless_the_engine_waited_for_work():
    pacer = Pacer(LatencyModel(PRIOR), Objectives(), StepTrace())
    pacer.planned("a", 1.000, DECODE, None)
    pacer.finished("a", 1.010)
    pacer.planned("b", 1.012, DECODE, None)
    pacer.finished("b", 1.020)
    pacer.idle()
    pacer.planned("c", 9.000, DECODE, None)
    pacer.finished("c", 9.010)
    assert pacer.trace is not None
    assert np.allclose(pacer.trace.records()["actual"], [0.010, 0.010, 0.010], atol=1e-6)


def test_a_step_whose_time_says_nothing_is_not_learnt_from():
    pacer = Pacer(LatencyModel(PRIOR), Objectives())
    room = pacer.room(0.0, IDLE, tokens=100, rows=1)
    room.take_chunk(0, 50)
    pacer.planned(1, 0.0, IDLE, room, measurable=False)
    pacer.finished(1, 60.0)
    assert pacer.model.num_observed == 0


def test_without_a_job_most_steps_cost_nothing_and_some_teach():
    pacer = Pacer(LatencyModel(COSTS), Objectives())
    for step in range(1000):
        pacer.planned(step, 0.01 * step, DECODE, None)
        pacer.finished(step, 0.01 * (step + 1))
    assert 64 < pacer.model.num_observed < 200


def test_the_trace_holds_prediction_bound_and_measured_time_of_each_step():
    server = new(trace=StepTrace())
    for _ in range(100):
        server.step(DECODE)
    assert server.pacer.trace is not None
    records = server.pacer.trace.records()[20:]
    assert (records["predicted"] <= records["bound"]).all()
    assert np.median(np.abs(records["predicted"] / records["actual"] - 1)) < 0.1
    assert (records["spent"] <= records["budget"] + 1e-6).all()
    assert (records["finetune_tokens"] > 0).all()


def test_a_step_that_cannot_be_learnt_is_told_once_and_forgotten(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pacer = Pacer(LatencyModel(PRIOR), Objectives())
    for step in range(3):
        pacer.planned(step, 0.01 * step, DECODE, None)
        pacer.finished(step, 0.01 * (step + 1))

    def broken(*_: object) -> None:
        raise FloatingPointError("no number")

    monkeypatch.setattr(LatencyModel, "observe", broken)
    with pytest.raises(FloatingPointError):
        pacer.learn()
    pacer.learn()
    assert pacer.model_state()["num_observed"] == 0


STEADY = StepLoad(decode_rows=8, context=4000, num_requests=8)


@pytest.fixture
def learnt() -> Server:
    server = new()
    for _ in range(200):
        server.step(STEADY)
    return server


def drawn_ahead(server: Server, load: StepLoad) -> Room:
    room = server.pacer.room_ahead(server.now, load, tokens=2048, rows=8)
    tokens = room.fit_chunk(0, 10**6, 16)
    assert tokens > 0
    room.take_chunk(0, tokens)
    return room


@pytest.mark.parametrize(
    ("change", "holds"),
    [
        ({}, True),
        ({"decode_rows": 7}, True),
        ({"decode_rows": 9}, False),
        ({"prefill_tokens": 1}, False),
        ({"context": 4001}, False),
        ({"num_waiting": 1}, False),
        ({"num_requests": 9}, False),
        ({"decode_rows": 0, "context": 0, "num_requests": 0}, False),
    ],
)
def test_what_was_drawn_ahead_holds_for_the_load_foreseen_and_a_little_less(
    change, holds, learnt: Server
):
    room = drawn_ahead(learnt, STEADY)
    load = replace(STEADY, **change)
    assert learnt.pacer.holds(learnt.now, load, STEADY, room) is holds


def test_what_was_drawn_for_an_idle_step_does_not_hold_when_a_request_is_there(learnt: Server):
    room, now = drawn_ahead(learnt, IDLE), learnt.now
    assert learnt.pacer.holds(now, IDLE, IDLE, room)
    assert not learnt.pacer.holds(now, StepLoad(prefill_tokens=1, num_requests=1), IDLE, room)
    assert not learnt.pacer.holds(now, StepLoad(num_waiting=1), IDLE, room)


def test_what_was_drawn_ahead_does_not_hold_when_it_would_make_a_token_late(learnt: Server):
    now, foreseen = learnt.now, StepLoad(decode_rows=1, context=16, num_requests=1)
    learnt.pacer.tokens.first_token("a", now)
    room = drawn_ahead(learnt, foreseen)
    assert learnt.pacer.holds(now, foreseen, foreseen, room)
    late = now + 0.5 * TPOT_S  # the step before was long
    assert not learnt.pacer.holds(late, foreseen, foreseen, room)


def test_what_a_later_step_leaves_less_of_is_not_taken_after_all(learnt: Server):
    now, foreseen = learnt.now, StepLoad(decode_rows=1, context=16, num_requests=1)
    learnt.pacer.tokens.first_token("a", now)
    room = learnt.pacer.room_ahead(now, foreseen, tokens=2048, rows=8)
    room.take_chunk(0, 16)
    left = room.seconds
    late = 0.5 * left
    assert learnt.pacer.holds(now + late, foreseen, foreseen, room)
    assert room.seconds == pytest.approx(left - late, abs=0.1 * left)


def test_what_min_share_gives_holds_although_a_token_is_late():
    server = new()
    server.pacer.objectives = Objectives(TPOT_S, min_share=0.5)
    for _ in range(200):
        server.step(STEADY)
    server.pacer.tokens.first_token("a", server.now - 7 * TPOT_S)
    room = drawn_ahead(server, STEADY)
    assert server.pacer.holds(server.now, STEADY, STEADY, room)
