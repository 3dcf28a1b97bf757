"""`vllm_flexft::capture`, a custom op: what forward hooks do, in a model that is compiled too.

Compiled code calls no hooks of submodules. The op is put around a module's forward before the
model is compiled; to the compiler it is opaque, and at run time it hands a tensor to whoever
listens at its site, while the model's sites are open. Else it does nothing, so that a CUDA graph
captured meanwhile holds nothing of it; a step with open sites must therefore not replay a graph.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

Pick = Callable[[tuple, Any], Tensor]  # from a module's arguments and output: the tensor to keep
Listener = Callable[[Tensor], None]

_LIBRARY = torch.library.Library("vllm_flexft", "FRAGMENT")


class Sites:
    """The ops in a model, numbered as they were placed: the number is in the compiled code, which
    other processes read from a cache."""

    # An op takes tensors and numbers only: it finds its listeners here, as vLLM's attention op
    # finds its layer in the forward context.
    _open: ClassVar[Sites | None] = None

    def __init__(self) -> None:
        self._number: dict[Hashable, int] = {}
        self._listeners: list[list[Listener]] = []

    def place(self, key: Hashable, module: nn.Module, pick: Pick, *, before: bool = False) -> None:
        """Put the op after `module` (or before it), for the tensor that `pick` finds.

        To be called before the model is compiled. Parameters have to be on their device already.
        """
        assert key not in self._number, key
        site = self._number[key] = len(self._listeners)
        self._listeners.append([])
        forward = module.forward
        anchor = torch.zeros(1, device=next(module.parameters()).device)
        module.register_buffer(f"_flexft_anchor_{site}", anchor, persistent=False)

        def with_capture(*args: Any, **kwargs: Any) -> Any:
            if before:
                torch.ops.vllm_flexft.capture(pick(args, None), anchor, site)
            output = forward(*args, **kwargs)
            if not before:
                torch.ops.vllm_flexft.capture(pick(args, output), anchor, site)
            return output

        module.forward = with_capture

    @property
    def keys(self) -> Iterable[Any]:
        return self._number.keys()

    def listen(self, key: Hashable, listener: Listener) -> Callable[[], None]:
        """Call `listener` with the tensor in every forward while the sites are open. Returns what
        ends it."""
        listeners = self._listeners[self._number[key]]
        listeners.append(listener)
        return lambda: listeners.remove(listener)

    def open(self) -> None:
        """The forwards from here to `close` are of this model."""
        Sites._open = self

    @staticmethod
    def close() -> None:
        Sites._open = None


def _capture(x: Tensor, anchor: Tensor, site: int) -> None:
    if (sites := Sites._open) is not None:
        for listener in sites._listeners[site]:
            listener(x)


# An op that writes nothing and returns nothing would be removed as dead: it claims `anchor`.
_LIBRARY.define("capture(Tensor x, Tensor(a!) anchor, int site) -> ()")
_LIBRARY.impl("capture", _capture, "CompositeExplicitAutograd")
_LIBRARY._register_fake("capture", lambda x, anchor, site: None)
