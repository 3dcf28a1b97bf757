"""Replays arrivals over HTTP and times every answer as its client sees it.

vLLM's benchmark client (`vllm bench serve`) has the same clock but no trace with times of its own,
and loses what it has measured when a request is cut off, which under overload is most of them. Its
reader of streamed responses is used here.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import aiohttp
from vllm.benchmarks.lib.endpoint_request_func import StreamedResponseHandler

from benchmarks.co_serving.trace import Arrival

VOCAB = range(10, 2000)  # ids that mean text in every model of examples/make_model.py


@dataclass(slots=True)
class Answer:
    """One request as it went; times on the clock of `time.time`, which processes share.

    Args:
        due: when it should be sent. Latency counts from here, so that a client that is late does
            not make the server look fast.
        tokens: time and number of output tokens so far, at each message of the stream.
        ended: when the answer was complete, or was cut off; None while it runs.
        error: why it is not complete.
    """

    arrival: Arrival
    due: float
    tokens: list[tuple[float, int]] = field(default_factory=list)
    ended: float | None = None
    error: str | None = None

    @property
    def complete(self) -> bool:
        return self.ended is not None and self.error is None

    @property
    def ttft_s(self) -> float:
        """Time to first token; for an answer without any, how long it was waited for."""
        return (self.tokens[0][0] if self.tokens else self.ended or time.time()) - self.due

    @property
    def tpot_s(self) -> float | None:
        """Mean time per output token after the first; None before the second."""
        if not self.tokens or self.tokens[-1][1] < 2:
            return None
        (first, had), (last, have) = self.tokens[0], self.tokens[-1]
        return (last - first) / (have - had) if have > had else 0.0


class Replay:
    """Open-loop traffic: requests do not wait for each other.

    Args:
        url: of the server.
        model: its served name.
        seed: of the prompts, random tokens, so that no prefix is cached.
    """

    def __init__(self, url: str, model: str, seed: int = 0) -> None:
        self.url, self.model = url, model
        self.in_flight = 0
        self._draw = random.Random(seed)

    async def run(
        self, arrivals: Sequence[Arrival], *, grace_s: float, start: float | None = None
    ) -> list[Answer]:
        """Send each arrival at its time; `grace_s` after the last, cut off what still runs."""
        began = time.time() if start is None else start
        answers = [Answer(arrival, began + arrival.at_s) for arrival in arrivals]
        timeout = aiohttp.ClientTimeout(total=None)
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
            tasks = []
            for answer in answers:
                await asyncio.sleep(max(0.0, answer.due - time.time()))
                tasks.append(asyncio.create_task(self._request(session, answer)))
            _, running = await asyncio.wait(tasks, timeout=grace_s)
            for task in running:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        return answers

    async def one_by_one(self, arrivals: Sequence[Arrival]) -> list[Answer]:
        """Each sent when the one before is answered: the server without load."""
        answers = []
        for arrival in arrivals:
            answers += await self.run([Arrival(0.0, *_lengths(arrival))], grace_s=60.0)
        return answers

    async def all_at_once(self, arrivals: Sequence[Arrival], *, at_most_s: float) -> list[Answer]:
        return await self.run([Arrival(0.0, *_lengths(a)) for a in arrivals], grace_s=at_most_s)

    async def _request(self, session: aiohttp.ClientSession, answer: Answer) -> None:
        self.in_flight += 1
        try:
            await self._stream(session, answer)
            if not answer.tokens or answer.tokens[-1][1] != answer.arrival.output_tokens:
                answer.error = f"{answer.tokens[-1][1] if answer.tokens else 0} tokens came"
        except asyncio.CancelledError:
            answer.error = "cut off"
        except (aiohttp.ClientError, OSError, ValueError) as error:
            answer.error = f"{type(error).__name__}: {error}"
        finally:
            answer.ended = time.time()
            self.in_flight -= 1

    async def _stream(self, session: aiohttp.ClientSession, answer: Answer) -> None:
        payload = {
            "model": self.model,
            "prompt": self._draw.choices(VOCAB, k=answer.arrival.prompt_tokens),
            "max_tokens": answer.arrival.output_tokens,
            "temperature": 0.0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        }
        async with session.post(f"{self.url}/v1/completions", json=payload) as response:
            if response.status != 200:
                raise ValueError(f"status {response.status}: {(await response.text())[:200]}")
            handler = StreamedResponseHandler()
            async for chunk in response.content.iter_any():
                now = time.time()
                for message in handler.add_chunk(chunk):
                    data = message.removeprefix("data: ")
                    if data == "[DONE]" or not (parsed := json.loads(data)).get("choices"):
                        continue
                    count = parsed["usage"]["completion_tokens"]
                    if count and (not answer.tokens or count > answer.tokens[-1][1]):
                        answer.tokens.append((now, count))


def _lengths(arrival: Arrival) -> tuple[int, int, str]:
    return arrival.prompt_tokens, arrival.output_tokens, arrival.source
