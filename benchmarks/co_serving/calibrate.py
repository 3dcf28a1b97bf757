"""What the loads and the objectives of a run are measured by: the plain server, alone."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence

from demo_server import DemoError

from benchmarks.co_serving.client import Answer, Replay
from benchmarks.co_serving.measures import Slo, Window, quantile
from benchmarks.co_serving.trace import Arrival

# The objectives against what inference alone keeps for 99 % of requests at its peak. An operator
# sets them above that, or the server would miss them by itself at every busy minute; half as much
# again is what is left for anything beside inference.
FACTOR = 1.5
LEAST_TTFT_S = 1.0  # nobody is held to less for the first token of an answer


async def unloaded(replay: Replay, probes: Sequence[Arrival]) -> dict[str, float]:
    """Median times of requests sent one by one; the first few warm the server up."""
    await replay.one_by_one(probes[:3])
    alone = await replay.one_by_one(probes)
    return {
        "tpot_ms": 1e3 * statistics.median(t for a in alone if (t := a.tpot_s) is not None),
        "ttft_ms": 1e3 * statistics.median(a.ttft_s for a in alone),
    }


async def capacity(replay: Replay, burst: Sequence[Arrival]) -> float:
    """Requests a second that the server answers when all are sent at once.

    Raises:
        DemoError: some were not answered.
    """
    began = time.time()
    answers = await replay.all_at_once(burst, at_most_s=240.0)
    ends = sorted(a.ended for a in answers if a.complete and a.ended is not None)
    if len(ends) < len(answers):
        raise DemoError(f"capacity: {len(answers) - len(ends)} requests were not answered")
    # The last ones run in half-empty batches: 90 % of the answers tell the steady rate.
    most = ends[: max(1, round(0.9 * len(ends)))]
    return len(most) / (most[-1] - began)


def objectives(answers: Sequence[Answer], window: Window) -> Slo:
    """From inference alone at the peak."""
    inside = [a for a in answers if window.start <= a.due < window.stop]
    tpots = [tpot for a in inside if (tpot := a.tpot_s) is not None]
    ttft = quantile([a.ttft_s for a in inside], 0.99)
    return Slo(tpot_s=FACTOR * quantile(tpots, 0.99), ttft_s=max(LEAST_TTFT_S, FACTOR * ttft))
