"""What a patch of vLLM is, and the check that the patched source is still the one we read.

Every module of this package has a `PATCH` (its entry in the ledger) and an `install` function.
"""

import hashlib
import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

_MODULES = (
    "cli_args",
    "from_cli_args",
    "engine_config",
    "engine_loop",
    "punica_cpu",
    "cpu_weights",
    "cpu_compile",
)
_MARK = "__flexft_patch__"


@dataclass(frozen=True)
class Patch:
    """One patched symbol of vLLM.

    Args:
        target: the replaced symbol, `module:qualified.name`.
        sha256: of the source text of `target`, as `inspect.getsource` returns it.
        relies_on: further symbols, in the same form, whose source the patch depends on, each with
            its hash.
    """

    target: str
    sha256: str
    relies_on: tuple[tuple[str, str], ...] = ()

    @property
    def sources(self) -> tuple[tuple[str, str], ...]:
        """(symbol, sha256) of everything the patch was written against."""
        return ((self.target, self.sha256), *self.relies_on)


def patches() -> tuple[Patch, ...]:
    """All patches, in the order of the ledger."""
    return tuple(importlib.import_module(f"flexft_patches.{name}").PATCH for name in _MODULES)


def source_sha256(symbol: str) -> str:
    """SHA-256 of the source of `module:qualified.name` in the installed vLLM.

    A symbol that is already patched answers for its original.
    """
    module, _, qualname = symbol.partition(":")
    found: Any = importlib.import_module(module)
    for name in qualname.split("."):
        found = getattr(found, name)
    # A classmethod of a wrapper is a bound method, which inspect.unwrap does not look into.
    found = inspect.unwrap(getattr(found, "__func__", found))
    return hashlib.sha256(inspect.getsource(found).encode()).hexdigest()


def changed_sources() -> list[str]:
    """Symbols whose source in the installed vLLM is missing or not the one a patch expects."""
    changed = []
    for patch in patches():
        for symbol, expected in patch.sources:
            try:
                actual = source_sha256(symbol)
            except (ImportError, AttributeError, OSError):
                actual = "missing"
            if actual != expected:
                changed.append(symbol)
    return changed


def mark(function: Callable[..., Any]) -> Callable[..., Any]:
    """Mark a replacement, so that a second install finds it and leaves it alone."""
    setattr(function, _MARK, True)
    return function


def is_patched(function: Any) -> bool:
    """Whether `function` is one of our replacements."""
    return hasattr(getattr(function, "__func__", function), _MARK)
