"""Patch of `EngineArgs.create_engine_config`: where LoRA, worker and scheduler are chosen.

It is the one place that the command line and `LLM(...)` share.
"""

import functools
from collections.abc import Callable
from typing import Any

from flexft_patches.ledger import Patch, is_patched, mark

PATCH = Patch(
    target="vllm.engine.arg_utils:EngineArgs.create_engine_config",
    sha256="b9b94288f46d2f679c3f30825ddd2eb3b1f6a9958115c80505c4c948b972150f",
)


def install(build: Callable[[Callable[..., Any], Any, bool], Any]) -> None:
    """Replace the method by `build(create, engine_args, headless)`. Idempotent.

    `create()` runs the original on `engine_args` and returns its `VllmConfig`.
    """
    from vllm.engine.arg_utils import EngineArgs

    original = EngineArgs.create_engine_config
    if is_patched(original):
        return

    @functools.wraps(original)
    def create_engine_config(self: Any, usage_context: Any = None, headless: bool = False) -> Any:
        create = functools.partial(original, self, usage_context=usage_context, headless=headless)
        return build(create, self, headless)

    EngineArgs.create_engine_config = mark(create_engine_config)
