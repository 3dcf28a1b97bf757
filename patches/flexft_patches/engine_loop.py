"""Patch of `EngineCoreProc.run_busy_loop`: lets a scheduler wake the engine's idle loop.

The loop sleeps on its input queue while no request is in flight. A finetune job becomes ready in
a thread of the same process, so the scheduler is told how to wake the loop, and whether the
engine is shutting down (then finetuning must not keep it alive).
"""

import functools
from typing import Any

from flexft_patches.ledger import Patch, is_patched, mark

PATCH = Patch(
    target="vllm.v1.engine.core:EngineCoreProc.run_busy_loop",
    sha256="790a9d50e05f23ac927647f916cfaec67a76f56974cd1c0c681ed03b0f44a46a",
    relies_on=(
        (
            "vllm.v1.engine.core:EngineCoreProc._process_input_queue",
            "215a7d373e636f988ed1791da1b810d6edb9bff67d353e485d59fba0fc5024af",
        ),
        (
            "vllm.v1.engine.core:EngineCoreProc.is_running",
            "25fdbecbf47bdd891e77f3c39734cc4b7bbda733c85c5f0be6926203896f0133",
        ),
    ),
)


def install() -> None:
    """Call `scheduler.bind_engine(wake, is_running)` before the loop starts. Idempotent."""
    from vllm.v1.engine import EngineCoreRequestType
    from vllm.v1.engine.core import EngineCoreProc, EngineShutdownState

    original = EngineCoreProc.run_busy_loop
    if is_patched(original):
        return

    @functools.wraps(original)
    def run_busy_loop(self: Any) -> Any:
        bind = getattr(self.scheduler, "bind_engine", None)
        if bind is not None:
            bind(
                wake=lambda: self.input_queue.put_nowait((EngineCoreRequestType.WAKEUP, None)),
                is_running=lambda: self.shutdown_state == EngineShutdownState.RUNNING,
            )
        return original(self)

    EngineCoreProc.run_busy_loop = mark(run_busy_loop)
