"""What our scheduler adds to a step of the engine, in microseconds.

    python -m benchmarks.plan_overhead [--running 256] [--samples 1000000] [--steps 3000]

The real scheduler without a model: requests decode, a job with so many samples trains beside them,
and the clock shows what an H200 would take for a model of 8 billion parameters. The engine's
calls are measured whole, and vLLM's own calls inside them; the difference is ours. The last line is
JSON: {"plan_us_p50": x, "plan_us_p99": y, ...}. `plan_us` is of `schedule()` and
`update_from_output()`, between which the worker has the step, and which it waits for; `ahead_us` of
`get_grammar_bitmask()`, while it computes. `vllm_us_p50` is what vLLM's own calls take: a virtual
machine may be twice as slow in one minute as in the next, and both change with it.
"""

from __future__ import annotations

import argparse
import gc
import json
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from benchmarks.bare_scheduler import BareEngine, prepared_job

# Seconds a unit of each Feature, in its order: H200, 8 B parameters in bf16, by FLOP and bytes.
H200_8B = np.array(
    [5e-3, 1e-5, 3.5e-5, 3e-8, 2e-3, 3.5e-5, 1e-9, 5e-6, 1.6e-6, 1e-10, 2e-10, 1e-10],
    dtype=np.float64,
)
TPOT_MS = 40.0
WARM_STEPS = 300


@contextmanager
def clock(module: Any) -> Iterator[SimpleNamespace]:
    """`module` reads this clock in place of the machine's: planning depends on how long steps
    take, and here they take no time."""
    shown = SimpleNamespace(now=1000.0)
    real, module.time = module.time, SimpleNamespace(monotonic=lambda: shown.now)
    try:
        yield shown
    finally:
        module.time = real


class Stopwatch:
    """Time in an object's methods, and of it in those of its base class."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def call(self, method: Any, *args: Any) -> tuple[Any, float, float]:
        """The result, and seconds outside and inside of the base class."""
        self.seconds, started = 0.0, time.perf_counter()
        result = method(*args)
        return result, time.perf_counter() - started - self.seconds, self.seconds

    def around(self, cls: Any, name: str) -> None:
        method = getattr(cls, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            try:
                return method(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - started

        setattr(cls, name, timed)


def measure_planning(
    num_running: int = 256, num_samples: int = 1_000_000, steps: int = 3000
) -> dict[str, Any]:
    """Microseconds a step that finetuning adds to scheduling, over `steps` steps."""
    from vllm.v1.core.sched.scheduler import Scheduler

    from vllm_flexft.sched import scheduler as ours
    from vllm_flexft.sched.latency import Feature

    rng = np.random.default_rng(0)
    rows, prompt = 8, 64
    length = prompt + WARM_STEPS + steps + 64
    blocks = num_running * -(-length // 16) + 4096
    inner = Stopwatch()
    timed = ("schedule", "update_from_output", "get_grammar_bitmask")
    originals = {name: getattr(Scheduler, name) for name in timed}
    with tempfile.TemporaryDirectory() as folder, clock(ours) as shown:
        engine = BareEngine(
            Path(folder) / "model",
            blocks=blocks,
            max_num_seqs=num_running + rows,
            max_num_batched_tokens=8192,
            max_model_len=length,
            options={"tpot_ms": TPOT_MS, "max_rows_in_flight": rows},
        )
        try:
            for name in originals:
                inner.around(Scheduler, name)
            for _ in range(num_running):
                engine.ask(prompt, max_tokens=length)
            endless = {"max_steps": 10**6, "save_steps": 10**6, "train_batch_size": 16}
            lengths = rng.integers(64, 512, num_samples)
            job = prepared_job(lengths, Path(folder) / "out", **endless)
            engine.train(job)
            added, ahead, theirs = np.zeros(steps), np.zeros(steps), np.zeros(steps)
            tokens, scheduler = engine.worker.tokens, engine.scheduler
            gc.collect()
            gc.freeze()  # as vLLM does once its engine is up
            for step in range(-WARM_STEPS, steps):
                output, before, theirs_before = inner.call(scheduler.schedule)
                _, meanwhile, _ = inner.call(scheduler.get_grammar_bitmask, output)
                result = engine.execute(output)
                running = next(iter(scheduler._pacer._running.values()), None)
                took = float(H200_8B @ running.features) if running is not None else 0.0
                shown.now += max(took, 1e-4) * float(np.exp(0.03 * rng.standard_normal()))
                _, after, theirs_after = inner.call(scheduler.update_from_output, output, result)
                if step >= 0:
                    added[step], ahead[step] = before + after, meanwhile
                    theirs[step] = theirs_before + theirs_after
            decoding = len(scheduler.running)
            tokens = engine.worker.tokens - tokens
            features = len(Feature)
        finally:
            gc.unfreeze()
            for name, method in originals.items():
                setattr(Scheduler, name, method)
            engine.close()
    assert decoding == num_running, f"{decoding} of {num_running} requests run"
    assert features == len(H200_8B)

    def percentile(seconds: np.ndarray, percent: int) -> float:
        return round(1e6 * float(np.percentile(seconds, percent)), 1)

    return {
        "plan_us_p50": percentile(added, 50),
        "plan_us_p99": percentile(added, 99),
        "plan_us_mean": round(1e6 * float(added.mean()), 1),
        "ahead_us_p50": percentile(ahead, 50),
        "ahead_us_p99": percentile(ahead, 99),
        "vllm_us_p50": percentile(theirs, 50),
        "finetune_tokens_a_step": round(tokens / (steps + WARM_STEPS), 1),
        "updates": engine.worker.updates,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--running", type=int, default=256, help="requests that decode")
    parser.add_argument("--samples", type=int, default=1_000_000, help="of the job's data set")
    parser.add_argument("--steps", type=int, default=3000, help="that are measured")
    arguments = parser.parse_args()
    result = measure_planning(arguments.running, arguments.samples, arguments.steps)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
