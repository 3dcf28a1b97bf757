"""Patch of `EngineArgs.from_cli_args`: lets the plugin read its options from the namespace."""

import functools
from argparse import Namespace
from collections.abc import Callable
from typing import Any

from flexft_patches.ledger import Patch, is_patched, mark

PATCH = Patch(
    target="vllm.engine.arg_utils:EngineArgs.from_cli_args",
    sha256="51a013f61829ac5c0f4f2259d8dba5803bcd0b66b4bcad8071b2733c09be6a43",
)


def install(prepare: Callable[[Namespace], None]) -> None:
    """Call `prepare(args)`, which may change `args`, before vLLM reads them. Idempotent."""
    from vllm.engine.arg_utils import EngineArgs

    if is_patched(EngineArgs.from_cli_args):
        return
    original = EngineArgs.from_cli_args.__func__

    @functools.wraps(original)
    def from_cli_args(cls: type, args: Namespace) -> Any:
        prepare(args)
        return original(cls, args)

    EngineArgs.from_cli_args = classmethod(mark(from_cli_args))
