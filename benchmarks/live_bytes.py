"""A tracking allocator for CPU tensors: bytes of live storages that operations made."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten


class LiveBytes(TorchDispatchMode):
    """While entered, counts every new storage, and counts it off when it is freed.

    A storage is new when no argument of the operation has it: views and in-place results are not.
    `total` is what lives, `peak` the most that lived since `peak` was last set.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {id(storage) for storage in _storages((args, kwargs))}
        for storage in _storages(result):
            if id(storage) not in given and id(storage) not in self._known:
                self._known.add(id(storage))
                self.total += storage.nbytes()
                self.peak = max(self.peak, self.total)
                weakref.finalize(storage, self._freed, id(storage), storage.nbytes())
        return result

    def _freed(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.total -= size


def _storages(values: Any) -> list[torch.UntypedStorage]:
    return [x.untyped_storage() for x in tree_flatten(values)[0] if isinstance(x, torch.Tensor)]
