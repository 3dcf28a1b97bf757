"""`vllm_flexft::capture`, a custom op: what forward hooks do, in a model that was compiled.

Compiled code calls no hooks of submodules. The op is put around a module's forward before the
model is compiled; to the compiler it is opaque, and at run time it hands a tensor to whoever
listens at its site. With no listener it does nothing, so that a CUDA graph captured meanwhile holds
nothing of it; a step with listeners must therefore not replay a graph.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Pick = Callable[[tuple, Any], Tensor]  # from a module's arguments and output: the tensor to keep
Listener = Callable[[Tensor], None]

_LIBRARY = torch.library.Library("vllm_flexft", "FRAGMENT")
# The sites of this process's model. An op takes tensors and numbers only: it finds its listeners
# here, as vLLM's attention op finds its layer in the static forward context.
_SITES: list[list[Listener]] = []


def _capture(x: Tensor, anchor: Tensor, site: int) -> None:
    for listener in _SITES[site]:
        listener(x)


# An op that writes nothing and returns nothing would be removed as dead: it claims `anchor`.
_LIBRARY.define("capture(Tensor x, Tensor(a!) anchor, int site) -> ()")
_LIBRARY.impl("capture", _capture, "CompositeExplicitAutograd")
_LIBRARY._register_fake("capture", lambda x, anchor, site: None)


def place(module: nn.Module, name: str, pick: Pick, *, before: bool = False) -> None:
    """Put the op after `module` (or before it), for the tensor that `pick` finds.

    To be called before the model is compiled, once for a module and name. Parameters have to be on
    their device already.
    """
    sites: dict[str, list[Listener]] = module.__dict__.setdefault("_flexft_sites", {})
    assert name not in sites, name
    sites[name] = []
    site = len(_SITES)
    _SITES.append(sites[name])
    forward = module.forward
    anchor = torch.zeros(1, device=next(module.parameters()).device)
    module.register_buffer(f"_flexft_anchor_{name}", anchor, persistent=False)

    def with_capture(*args: Any, **kwargs: Any) -> Any:
        if before:
            torch.ops.vllm_flexft.capture(pick(args, None), anchor, site)
        output = forward(*args, **kwargs)
        if not before:
            torch.ops.vllm_flexft.capture(pick(args, output), anchor, site)
        return output

    module.forward = with_capture


def listen(
    module: nn.Module, name: str, pick: Pick, listener: Listener, *, before: bool = False
) -> Callable[[], None]:
    """Call `listener` at every forward of `module`: by the op where one was placed, else by a
    hook. Returns what ends it."""
    site = module.__dict__.get("_flexft_sites", {}).get(name)
    if site is not None:
        site.append(listener)
        return lambda: site.remove(listener)
    if before:
        return module.register_forward_pre_hook(lambda _, args: listener(pick(args, None))).remove
    return module.register_forward_hook(lambda _, args, output: listener(pick(args, output))).remove
