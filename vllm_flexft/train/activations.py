"""What the forward pass leaves behind for the backward pass: the activation arena.

One allocation when the job opens. A lane of it holds one micro-batch: for every kept
(layer, tensor) a buffer of rows, one a token, filled by the capture, chunk by chunk, in any
order. Which tensors a layer keeps is the memory plan's choice (graph/memory.py); keys and values
are never among them, they are read back from the paged cache.

Legend: T tokens, D hidden, H query heads, K KV heads, E head dim, F MLP width.
    residual_in   (T, D)   input of the layer, before its norm
    qkv           (T, H E), with qk-norm (T, (H+K)E): projections before qk-norm and rope
    attention     (T, H E) attention output, input of o_proj
    residual_mid  (T, D)   after attention was added, before the MLP's norm
    gate_up       (T, 2F)  input of the gated activation
The stage above the last layer leaves `residual_in` only: the input of the final norm.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from flexft_kernels.ops import copy_rows
from vllm_flexft.graph.job_memory import Lanes
from vllm_flexft.graph.memory import MemoryPlan

Key = tuple[int, str]  # layer (or the number of layers: the final norm), tensor


@dataclass(frozen=True, slots=True)
class LaneRows:
    """Which rows of a batch go to which rows of a lane, for every tensor of a forward.

    ranges: (start, stop, to): rows [start, stop) of the batch go to the lane from row `to` on.
    index: the same as two (n,) integer tensors on the device, rows of the batch and of the lane,
    where one launch for all ranges is worth it.
    """

    lane: int
    ranges: tuple[tuple[int, int, int], ...]
    index: tuple[Tensor, Tensor] | None = None


class ActivationStore:
    """Lanes of captured activations; rows are tokens of a micro-batch, in its order.

    Args:
        offload: keep them in (pinned) host memory; rows come to the device when they are read.
    """

    def __init__(
        self,
        plan: MemoryPlan,
        lanes: Lanes,
        dtype: torch.dtype,
        device: torch.device,
        *,
        offload: bool = False,
    ) -> None:
        assert dtype.itemsize == plan.itemsize
        widths = plan.graph.widths
        keys = [(layer, name) for layer, choice in plan.kept.items() for name in choice.kept]
        keys.append((max(plan.kept) + 1, "residual_in"))
        self._device = device
        self._arena = torch.empty(
            lanes.total_tokens * sum(widths[name] for _, name in keys),
            dtype=dtype,
            device=torch.device("cpu") if offload else device,
            pin_memory=offload and device.type == "cuda",
        )
        sizes = [lanes.tokens * widths[name] for _ in range(lanes.count) for _, name in keys]
        pieces = iter(self._arena.split(sizes))
        self._lanes: list[dict[Key, Tensor]] = [
            {key: next(pieces).view(lanes.tokens, widths[key[1]]) for key in keys}
            for _ in range(lanes.count)
        ]

    @property
    def num_bytes(self) -> int:
        """Of all lanes."""
        return self._arena.nbytes

    def holds(self, layer: int, name: str) -> bool:
        return (layer, name) in self._lanes[0]

    def rows(self, lane: int, ranges: Iterable[tuple[int, int, int]]) -> LaneRows:
        """For `write`. A copy of a range is one launch, and a layer keeps five tensors: on a GPU
        several ranges go by index. On a CPU a range is a memcpy, and so is one to the host."""
        ranges = tuple(ranges)
        if self._arena.device.type != "cuda" or len(ranges) == 1:
            return LaneRows(lane, ranges)
        return LaneRows(lane, ranges, _index(ranges, self._device))

    def write(self, rows: LaneRows, layer: int, name: str, source: Tensor) -> None:
        """From a tensor of the whole batch; its columns beyond the kept width are dropped."""
        target = self._lanes[rows.lane][layer, name]
        if rows.index is not None:
            copy_rows(source, rows.index[0], target, rows.index[1])
            return
        for start, stop, to in rows.ranges:
            target[to : to + stop - start] = source[start:stop, : target.shape[1]]

    def window(self, lane: int, layer: int, start: int, stop: int) -> dict[str, Tensor]:
        """Name -> rows [start, stop) of everything that the layer keeps, on the device."""
        return {
            name: tensor[start:stop].to(self._device, non_blocking=True)
            for (at, name), tensor in self._lanes[lane].items()
            if at == layer
        }

    def pick(self, lane: int, layer: int, name: str, rows: Tensor) -> Tensor:
        """The given rows (n,) of one tensor, on the device."""
        tensor = self._lanes[lane][layer, name]
        return tensor[rows.to(tensor.device)].to(self._device, non_blocking=True)


def _index(ranges: Iterable[tuple[int, int, int]], device: torch.device) -> tuple[Tensor, Tensor]:
    pairs = [
        torch.stack((torch.arange(start, stop), torch.arange(to, to + stop - start)))
        for start, stop, to in ranges
    ]
    read, write = torch.cat(pairs, dim=1).to(device, non_blocking=True)
    return read, write
