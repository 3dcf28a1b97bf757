"""Patch of `CpuPlatform.get_punica_wrapper`: LoRA on CPU as one GEMM per segment of the batch.

The stock `PunicaWrapperCPU` gathers the adapter's weights once per token, and lets rows without an
adapter (index -1) read the last slot, which is wrong as soon as every slot is taken. Here the batch
is cut into segments, runs of consecutive tokens with the same adapter, and each is one pair of
GEMMs; rows without an adapter are not touched. In compiled code all of that is one op, which finds
the segments of the step in the wrapper that is `in_use`.

T tokens of a segment, K input features, N output features, R rank, L slices (q, k, v or gate, up).
"""

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import Any, NamedTuple

import torch
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

from flexft_patches.ledger import Patch, is_patched, mark

_STOCK = "vllm.lora.punica_wrapper.punica_cpu:PunicaWrapperCPU"

PATCH = Patch(
    target="vllm.platforms.cpu:CpuPlatform.get_punica_wrapper",
    sha256="61c5754d5d8319c7165b5805d77e30b2442295120cc6d6338c508a2095265fc7",
    relies_on=(
        (
            f"{_STOCK}.add_lora_linear",
            "60ca3d560987e8bbd777ea8f172822b17825da48cc90343e42ea0548b33cf5b9",
        ),
        (
            f"{_STOCK}.add_lora_logits",
            "ad70de0de3459e74a17e01339813ca49edcd9f81b815c60b19786f5373d47a54",
        ),
        (
            f"{_STOCK}.add_lora_embedding",
            "23ea185ba78f3f3af0dad72299e2dfc62268f3271b8b55f8004377874cc4400a",
        ),
        (
            "vllm.lora.punica_wrapper.punica_base:PunicaWrapperBase.update_metadata",
            "d495e482e77f030aef61b83f6cf90f2c4bde01d5ba5a050a6aa3c395eb886c62",
        ),
        (
            "vllm.lora.layers.base_linear:BaseLinearLayerWithLoRA._apply_lora_to_output",
            "57c8604ccec2e37fcdb00fa37f84896d1a3d10c6913cf29f3a78ff0d20a32cd0",
        ),
    ),
)


class Segment(NamedTuple):
    """Tokens `start` to `end` of the batch, all with the adapter in LoRA slot `slot`."""

    start: int
    end: int
    slot: int


class _SlotWeights(NamedTuple):
    """The non-zero part of one slot of one layer.

    Args:
        lora_a: A of all slices below each other, shape (sum of R, K).
        slices: first and end row of a slice in `lora_a`, its first output column, and its B.T of
            shape (R, N).
    """

    lora_a: torch.Tensor
    slices: tuple[tuple[int, int, int, torch.Tensor], ...]


class _Layer(NamedTuple):
    """What is known of one layer's stacked weights while they have these versions."""

    stacked: tuple[torch.Tensor, ...]  # held, so that no other tensor comes to lie there
    versions: tuple[int, ...]
    slots: dict[int, _SlotWeights | None]


def segments_of(lora_ids: Sequence[int], slot_of: dict[int, int]) -> tuple[Segment, ...]:
    """Cut a batch into runs of equal adapter; tokens without one (id 0) are in no segment."""
    found, start = [], 0
    for lora_id, run in groupby(lora_ids):
        end = start + sum(1 for _ in run)
        if lora_id > 0:
            found.append(Segment(start, end, slot_of[lora_id]))
        start = end
    return tuple(found)


class SegmentPunicaWrapperCPU(PunicaWrapperCPU):
    """Multi-LoRA on CPU: `y[segment] += (x[segment] A^T) B^T * scale`, slice by slice.

    Slots are padded with zeros to `max_lora_rank`. The padding is left out of the GEMMs: a slot's
    rank is that of its last non-zero row of A, looked up again whenever the stacked tensor was
    written to (torch counts in-place writes in `_version`).
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._token_segments: tuple[Segment, ...] = ()
        self._sampler_segments: tuple[Segment, ...] = ()
        self._layers: dict[int, _Layer] = {}  # by the address of A
        self.linears: dict[int, Any] = {}  # vLLM's LoRA layers, by the address of their first A

    def update_metadata(
        self,
        mapping: Any,
        lora_index_to_id: list[int | None],
        max_loras: int,
        vocab_size: int,
        **kwargs: Any,
    ) -> None:
        """Segments of this step's batch, once for all layers."""
        super().update_metadata(mapping, lora_index_to_id, max_loras, vocab_size, **kwargs)
        slot_of = {lora_id: slot for slot, lora_id in enumerate(lora_index_to_id) if lora_id}
        self._token_segments = segments_of(mapping.index_mapping, slot_of)
        self._sampler_segments = segments_of(mapping.prompt_mapping, slot_of)

    def add_lora_linear(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: tuple[torch.Tensor, ...],
        lora_b_stacked: tuple[torch.Tensor, ...],
        scale: float,
        output_slices: tuple[int, ...],
        *,
        buffer: tuple[torch.Tensor, ...] | None = None,
        **kwargs: Any,
    ) -> None:
        """`y += x A^T B^T * scale` for a linear layer.

        Args:
            y: shape (batch tokens, sum of N), changed in place.
            x: shape (batch tokens, K).
            lora_a_stacked: L tensors of shape (slots, 1, max rank, K).
            lora_b_stacked: L tensors of shape (slots, 1, N, max rank).
            scale: factor of the whole term; vLLM keeps alpha / r inside B and passes 1.
            output_slices: N of each slice.
            buffer: unused; the intermediate x A^T has the dtype of x.
        """
        if torch.compiler.is_compiling():
            assert scale == 1.0, scale
            torch.ops.flexft_patches.lora_linear(y, x, lora_a_stacked[0])
            return
        self._add(self._token_segments, y, x, lora_a_stacked, lora_b_stacked, scale, output_slices)

    def add_lora_logits(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: torch.Tensor,
        lora_b_stacked: torch.Tensor,
        scale: float,
        *,
        buffer: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> None:
        """`y += x A^T B^T * scale` for the LM head, one row a sampled request.

        Args: as in `add_lora_linear` with L = 1; y has shape (requests, V).
        """
        y_RV = y.view(-1, y.shape[-1])
        columns = (min(y_RV.shape[-1], lora_b_stacked.shape[-2]),)
        x_RK = x.view(-1, x.shape[-1])
        stacked = ((lora_a_stacked,), (lora_b_stacked,))
        self._add(self._sampler_segments, y_RV, x_RK, *stacked, scale, columns)

    def add_lora_embedding(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_b_stacked: torch.Tensor,
        add_inputs: bool = True,
        **kwargs: Any,
    ) -> None:
        """`y += x B^T` for the input embedding, where x is already the row of A of each token.

        Args:
            y: shape (batch tokens, D), changed in place.
            x: shape (batch tokens, max rank).
            lora_b_stacked: shape (slots, 1, D, max rank).
            add_inputs: False writes the term to the rows of y in place of adding it.
        """
        if torch.compiler.is_compiling():
            torch.ops.flexft_patches.lora_embedding(y, x, lora_b_stacked, add_inputs)
            return
        for start, end, slot in self._token_segments:
            rows = y[start:end]
            if not add_inputs:
                rows.zero_()
            rows.addmm_(x[start:end].to(y.dtype), lora_b_stacked[slot, 0].t().to(y.dtype))

    def _add(
        self,
        segments: tuple[Segment, ...],
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: tuple[torch.Tensor, ...],
        lora_b_stacked: tuple[torch.Tensor, ...],
        scale: float,
        output_slices: tuple[int, ...],
    ) -> None:
        if not segments:
            return
        slots = self._slots_of(lora_a_stacked)
        for start, end, slot in segments:
            if slot not in slots:
                slots[slot] = _slot_weights(lora_a_stacked, lora_b_stacked, output_slices, slot)
            weights = slots[slot]
            if weights is None:  # the adapter leaves this layer alone
                continue
            h_TR = torch.mm(x[start:end].to(weights.lora_a.dtype), weights.lora_a.t())
            if scale != 1.0:
                h_TR *= scale
            rows = y[start:end]
            for first, last, column, b_RN in weights.slices:
                target = rows[:, column : column + b_RN.shape[1]]
                target.addmm_(h_TR[:, first:last].to(y.dtype), b_RN.to(y.dtype))

    def _slots_of(self, lora_a_stacked: tuple[torch.Tensor, ...]) -> dict[int, _SlotWeights | None]:
        """The layer's looked-up slots, emptied when A has been written to since."""
        versions = tuple(a._version for a in lora_a_stacked)
        key = lora_a_stacked[0].data_ptr()
        layer = self._layers.get(key)
        if layer is None or layer.versions != versions:
            layer = _Layer(lora_a_stacked, versions, {})
            self._layers[key] = layer
        return layer.slots


_LIBRARY = torch.library.Library("flexft_patches", "FRAGMENT")
# `lora_a` is the first slice's, and stands for its layer: a list of all of them would take as long
# to hand over as the rest of an op that has nothing to do, which is most of them.
_LIBRARY.define("lora_linear(Tensor(a!) y, Tensor x, Tensor lora_a) -> ()")
_LIBRARY.define("lora_embedding(Tensor(a!) y, Tensor x, Tensor lora_b, bool add_inputs) -> ()")

# An op takes tensors and numbers only, and the same compiled code may serve several engines of a
# process: here it finds the wrapper of the one that runs.
_in_use: SegmentPunicaWrapperCPU | None = None


@contextmanager
def in_use(lora_manager: Any) -> Iterator[None]:
    """Inside the block forwards are of the model of this `LRUCacheWorkerLoRAManager`."""
    global _in_use
    modules = lora_manager._adapter_manager.modules
    _in_use = next((module.punica_wrapper for module in modules.values()), None)
    if _in_use is not None and not _in_use.linears:
        _in_use.linears = {
            module.lora_a_stacked[0].data_ptr(): module
            for module in modules.values()
            if hasattr(module, "output_slices")
        }
    try:
        yield
    finally:
        _in_use = None


def _lora_linear(y: torch.Tensor, x: torch.Tensor, lora_a: torch.Tensor) -> None:
    if (wrapper := _in_use) is not None and wrapper._token_segments:
        layer = wrapper.linears[lora_a.data_ptr()]
        stacked = layer.lora_a_stacked, layer.lora_b_stacked
        wrapper.add_lora_linear(y, x, *stacked, 1.0, layer.output_slices)


def _lora_embedding(
    y: torch.Tensor, x: torch.Tensor, lora_b: torch.Tensor, add_inputs: bool
) -> None:
    if (wrapper := _in_use) is not None and wrapper._token_segments:
        wrapper.add_lora_embedding(y, x, lora_b, add_inputs)


for _op in (_lora_linear, _lora_embedding):
    _LIBRARY.impl(_op.__name__.lstrip("_"), _op, "CompositeExplicitAutograd")
    _LIBRARY._register_fake(_op.__name__.lstrip("_"), lambda *args: None)


def _slot_weights(
    lora_a_stacked: tuple[torch.Tensor, ...],
    lora_b_stacked: tuple[torch.Tensor, ...],
    output_slices: tuple[int, ...],
    slot: int,
) -> _SlotWeights | None:
    """Pack the non-zero rows of A and point at the matching columns of B; None for a zero slot.

    A is copied, so that one GEMM serves all slices; B is a view and always current.
    """
    parts, slices, row, column = [], [], 0, 0
    for a, b, width in zip(lora_a_stacked, lora_b_stacked, output_slices, strict=True):
        a_RK = a[slot, 0]
        non_zero = a_RK.ne(0).any(dim=1).nonzero()
        rank = int(non_zero[-1]) + 1 if len(non_zero) else 0
        if rank:
            parts.append(a_RK[:rank])
            slices.append((row, row + rank, column, b[slot, 0, :width, :rank].t()))
        row += rank
        column += width
    return _SlotWeights(torch.cat(parts), tuple(slices)) if parts else None


def install() -> None:
    """Make LoRA on CPU use `SegmentPunicaWrapperCPU` from now on. Idempotent."""
    from vllm.platforms.cpu import CpuPlatform

    if is_patched(CpuPlatform.get_punica_wrapper):
        return
    original = CpuPlatform.get_punica_wrapper.__func__

    @functools.wraps(original)
    def get_punica_wrapper(cls: type) -> str:
        return f"{__name__}.{SegmentPunicaWrapperCPU.__name__}"

    CpuPlatform.get_punica_wrapper = classmethod(mark(get_punica_wrapper))
