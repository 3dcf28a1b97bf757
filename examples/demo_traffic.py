"""Client traffic: chat requests at random times, streamed, each one timed."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass

from openai import AsyncOpenAI, OpenAIError

REQUEST_TOKENS = 32  # every answer is this long, so that requests can be compared
TIMEOUT_S = 60.0


@dataclass(frozen=True)
class RequestTiming:
    """One request as its client saw it; times in seconds.

    Args:
        began: on the clock of `time.monotonic`.
        ttft: time to first token.
        tpot: mean time per output token after the first.
        error: why it failed; the times are then 0.
    """

    began: float
    ttft: float = 0.0
    tpot: float = 0.0
    error: str | None = None


class Traffic:
    """Requests whose times of arrival are a Poisson process: they do not wait for each other.

    Args:
        rate: requests a second; may be changed on the way.
        questions: asked in random order.
    """

    def __init__(
        self, client: AsyncOpenAI, model: str, questions: Sequence[str], rate: float, seed: int = 0
    ) -> None:
        self.timings: list[RequestTiming] = []
        self.rate = rate
        self._client, self._model, self._questions = client, model, questions
        self._random = random.Random(seed)
        self._under_way: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Send requests until cancelled; those under way are then awaited."""
        try:
            while True:
                task = asyncio.create_task(self._request(self._random.choice(self._questions)))
                self._under_way.add(task)
                task.add_done_callback(self._under_way.discard)
                await asyncio.sleep(self._random.expovariate(self.rate))
        finally:
            await asyncio.gather(*self._under_way)

    async def _request(self, question: str) -> None:
        began = time.monotonic()
        try:
            self.timings.append(await self._timed(question, began))
        except (OpenAIError, OSError) as error:
            self.timings.append(RequestTiming(began, error=f"{type(error).__name__}: {error}"))

    async def _timed(self, question: str, began: float) -> RequestTiming:
        stream = await self._client.chat.completions.create(
            model=self._model,
            messages=[{"role": "user", "content": question}],
            max_tokens=REQUEST_TOKENS,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"ignore_eos": True},
            timeout=TIMEOUT_S,
        )
        first = last = 0.0
        tokens = 0
        async for chunk in stream:
            if chunk.usage is not None:
                tokens = chunk.usage.completion_tokens
            if chunk.choices and chunk.choices[0].delta.content:
                last = time.monotonic()
                first = first or last
        if tokens < 2 or first == 0.0:
            return RequestTiming(began, error=f"an answer of {tokens} tokens")
        return RequestTiming(began, ttft=first - began, tpot=(last - first) / (tokens - 1))


async def ask(client: AsyncOpenAI, model: str, question: str) -> str:
    """The model's most likely answer."""
    answer = await client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": question}],
        max_tokens=48,
        temperature=0.0,
        timeout=TIMEOUT_S,
    )
    return (answer.choices[0].message.content or "").strip()
