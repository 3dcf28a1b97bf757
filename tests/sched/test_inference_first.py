"""Whatever finetuning does, vLLM schedules requests as if it were not there.

Two schedulers get the same requests: vLLM's own, and ours with a job that never ends. There is no
model behind them, so steps take no time and finetuning takes all the room it can get.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks.bare_scheduler import BareEngine, prepared_job
from vllm_flexft.sched import planner
from vllm_flexft.sched.planner import CREDIT_SHARE

BLOCKS = 60  # of 16 tokens: three of the longest requests, or six sequences in training
ROWS = 6  # requests at a time
FIXED = settings(
    derandomize=True, max_examples=25, deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip
# (step of arrival, prompt tokens, tokens to generate)
requests = st.lists(
    st.tuples(st.integers(0, 60), st.integers(2, 250), st.integers(1, 60)), min_size=1, max_size=14
)


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[BareEngine, BareEngine]]:
    """vLLM's scheduler, and ours in training."""
    folder = tmp_path_factory.mktemp("engines")
    plain = BareEngine(
        folder / "plain", blocks=BLOCKS, co_serving=False, max_num_seqs=ROWS, max_model_len=320
    )
    ours = BareEngine(
        folder / "ours", blocks=BLOCKS, max_num_seqs=ROWS, max_model_len=320,
        options={"tpot_ms": 1000, "step_trace": str(folder / "steps.jsonl")},
    )  # fmt: skip
    lengths = np.random.default_rng(0).integers(8, 300, 2000)
    job = prepared_job(lengths, folder / "out", max_steps=10**6, save_steps=10**6)
    ours.train(job)
    yield plain, ours
    ours.close()
    assert (folder / "steps.jsonl").stat().st_size > 0, "the trace is written when the engine stops"


def inference(output: object) -> dict[str, int]:
    scheduled: dict[str, int] = output.num_scheduled_tokens  # type: ignore[attr-defined]
    return {name: count for name, count in scheduled.items() if not name.startswith("flexft")}


def finetuning(output: object) -> int:
    return output.total_num_scheduled_tokens - sum(inference(output).values())  # type: ignore[attr-defined]


@FIXED
@given(requests)
def test_requests_run_in_the_same_steps_and_are_preempted_as_often(
    engines: tuple[BareEngine, BareEngine], requests: list
) -> None:
    plain, ours = engines
    before = ours.num_preemptions - plain.num_preemptions
    step = 0
    while step <= 60 or plain.scheduler.requests:
        for arrival, prompt, tokens in requests:
            if arrival == step:
                assert plain.ask(prompt, tokens) == ours.ask(prompt, tokens)
        assert inference(plain.step()) == inference(ours.step()), f"step {step}"
        step += 1
        assert step < 3000
    assert not ours.scheduler.requests
    assert ours.num_preemptions - plain.num_preemptions == before


def test_overload_ends_finetuning_in_the_same_step_and_it_comes_back_by_itself(
    engines: tuple[BareEngine, BareEngine],
) -> None:
    _, ours = engines
    assert sum(finetuning(ours.step()) for _ in range(30)) > 0
    for _ in range(3 * ROWS):
        ours.ask(100, 40)
    beside_waiting, after = 0, 0
    for _ in range(2000):
        output = ours.step()
        if len(ours.scheduler.waiting):
            beside_waiting += finetuning(output)
        if not ours.scheduler.requests:
            break
    for _ in range(30):
        after += finetuning(ours.step())
    assert beside_waiting == 0
    assert after > 0


def test_finetuning_goes_on_beside_steady_decoding(engines: tuple[BareEngine, BareEngine]) -> None:
    _, ours = engines
    ours.ask(20, 200)
    updates = ours.worker.updates
    while ours.scheduler.requests:
        ours.step()
    assert ours.worker.updates > updates


def test_a_request_is_held_to_its_objective_from_its_first_token_to_its_end(
    engines: tuple[BareEngine, BareEngine],
) -> None:
    from vllm.v1.request import RequestStatus

    _, ours = engines
    tokens, requests = ours.scheduler._pacer.tokens, ours.scheduler.requests
    for length in (30, 250, 40):
        ours.ask(length, 3 + length // 10)
    aborted = ours.ask(20, 300)
    most = 0
    for step in range(60):
        if step == 20:
            ours.scheduler.finish_requests(aborted, RequestStatus.FINISHED_ABORTED)
        ours.step()
        decoding = {name for name, request in requests.items() if request.num_output_tokens}
        assert decoding <= tokens._start.keys()
        most = max(most, len(tokens))
        if not requests:
            break
    ours.step()
    assert most == 4
    assert len(tokens) == 0


def test_all_lent_blocks_come_back(engines: tuple[BareEngine, BareEngine]) -> None:
    _, ours = engines
    for _ in range(20):
        ours.step()
    pool = ours.scheduler.kv_cache_manager.block_pool
    held = ours.scheduler._lender.num_blocks
    assert held == BLOCKS - pool.get_num_free_blocks() > 0
    ours.scheduler._release_all()
    assert ours.scheduler._lender.num_blocks == 0
    assert pool.get_num_free_blocks() == BLOCKS


def test_requests_that_cannot_run_do_not_stop_finetuning(
    engines: tuple[BareEngine, BareEngine],
) -> None:
    """vLLM keeps requests in its queue that wait for a grammar to be compiled."""
    from vllm.v1.request import RequestStatus

    _, ours = engines
    name = ours.ask(20, 5)
    request = ours.scheduler.requests[name]
    ours.scheduler.waiting.remove_request(request)
    request.status = RequestStatus.WAITING_FOR_REMOTE_KVS
    ours.scheduler._enqueue_waiting_request(request)
    try:
        load = ours.scheduler._load_of(ours.scheduler.schedule())
        assert load.num_waiting == 0
    finally:
        request.status = RequestStatus.WAITING
        ours.scheduler.deferred_waiting.discard(request)
        ours.scheduler.finish_requests(name, RequestStatus.FINISHED_ABORTED)


def test_the_trace_of_real_steps_shows_bounds_within_their_limits(
    engines: tuple[BareEngine, BareEngine], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planner, "HORIZON_S", 0.0)  # steps take no time: all is one burst
    _, ours = engines
    for _ in range(4):
        ours.ask(50, 60)
    for _ in range(80):
        ours.step()
    ours.scheduler.dump_step_trace(tmp_path / "steps.jsonl")
    steps = [json.loads(line) for line in (tmp_path / "steps.jsonl").read_text().splitlines()]
    busy = [s for s in steps[-80:] if s["decode_rows"] and s["spent"] > 0]
    assert len(busy) > 20
    credit = CREDIT_SHARE * 1.0
    assert all(s["bound"] <= s["limit"] + credit + 1e-6 for s in busy)
    assert all(s["finetune_blocks"] + s["free_blocks"] <= BLOCKS for s in steps)
    assert max(s["finetune_blocks"] for s in steps) > 0
    assert max(s["free_blocks"] for s in steps) > 0
    assert all(s["actual"] > 0 for s in busy[:-1])
