"""Patch of `EngineArgs.add_cli_args`: lets the plugin add its options to vLLM's parser."""

import functools
from argparse import ArgumentParser
from collections.abc import Callable

from flexft_patches.ledger import Patch, is_patched, mark

PATCH = Patch(
    target="vllm.engine.arg_utils:EngineArgs.add_cli_args",
    sha256="0b7444570415c68c90cbf8636cc15988c3bab33438acd65dbc75c26c125e5cba",
)


def install(extend: Callable[[ArgumentParser], None]) -> None:
    """Call `extend(parser)` after vLLM has added its own options. Idempotent."""
    from vllm.engine.arg_utils import EngineArgs

    original = EngineArgs.add_cli_args
    if is_patched(original):
        return

    @functools.wraps(original)
    def add_cli_args(parser: ArgumentParser) -> ArgumentParser:
        parser = original(parser)
        extend(parser)
        return parser

    EngineArgs.add_cli_args = staticmethod(mark(add_cli_args))
