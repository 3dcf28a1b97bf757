"""The client's clock, against a server that answers at known times."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from aiohttp import web

from benchmarks.co_serving.client import Answer, Replay
from benchmarks.co_serving.trace import Arrival

FIRST_S, GAP_S = 0.15, 0.05


def serve(act: Callable[[Replay], Awaitable[list[Answer]]]) -> tuple[list[Answer], list[Any]]:
    """Run `act` against a server: first token after FIRST_S, then one each GAP_S."""
    payloads: list[Any] = []

    async def complete(request: web.Request) -> web.StreamResponse:
        payload = await request.json()
        payloads.append(payload)
        if payload["max_tokens"] == 13:
            return web.Response(status=400, text="thirteen")
        response = web.StreamResponse()
        await response.prepare(request)
        for count in range(1, payload["max_tokens"] + 1):
            await asyncio.sleep(FIRST_S if count == 1 else GAP_S)
            message = {"choices": [{"text": ""}], "usage": {"completion_tokens": count}}
            await response.write(f"data: {json.dumps(message)}\n\n".encode())
        await response.write(b"data: [DONE]\n\n")
        return response

    async def run() -> list[Answer]:
        app = web.Application()
        app.router.add_post("/v1/completions", complete)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        port = runner.addresses[0][1]
        try:
            return await act(Replay(f"http://127.0.0.1:{port}", "m"))
        finally:
            await runner.cleanup()

    return asyncio.run(run()), payloads


def test_an_answer_is_timed_from_when_it_was_due() -> None:
    arrivals = [Arrival(0.0, 5, 3, "conv"), Arrival(0.1, 7, 5, "code")]
    answers, payloads = serve(lambda replay: replay.run(arrivals, grace_s=20))
    assert all(answer.complete for answer in answers)
    assert answers[1].due - answers[0].due == pytest.approx(0.1)
    for answer in answers:
        # A busy machine makes it later, never earlier.
        assert FIRST_S <= answer.ttft_s < FIRST_S + 2
        assert answer.tpot_s is not None
        assert GAP_S * 0.9 <= answer.tpot_s < GAP_S + 1
    assert [len(p["prompt"]) for p in payloads] == [5, 7]
    assert [p["max_tokens"] for p in payloads] == [3, 5]
    assert payloads[0]["prompt"] != payloads[1]["prompt"][:5], "a shared prefix would be cached"


def test_requests_do_not_wait_for_each_other() -> None:
    arrivals = [Arrival(0.01 * i, 4, 20, "conv") for i in range(10)]
    answers, _ = serve(lambda replay: replay.run(arrivals, grace_s=30))
    starts = [answer.tokens[0][0] for answer in answers]
    ends = [answer.ended or 0.0 for answer in answers]
    assert max(starts) < min(ends)


def test_what_is_cut_off_keeps_the_tokens_that_came() -> None:
    answers, _ = serve(lambda replay: replay.run([Arrival(0.0, 4, 1000, "conv")], grace_s=1.5))
    assert answers[0].error == "cut off"
    assert not answers[0].complete
    assert 1 <= len(answers[0].tokens) < 1000
    assert answers[0].ended is not None


def test_an_error_of_the_server_is_told() -> None:
    answers, _ = serve(lambda replay: replay.run([Arrival(0.0, 4, 13, "conv")], grace_s=5))
    assert answers[0].error == "ValueError: status 400: thirteen"
    assert not answers[0].complete
