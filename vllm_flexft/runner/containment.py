"""Keeps what a diverged adapter computes out of the KV cache, which requests share.

A request owns only the first part of its last block. Attention kernels read the whole block and
multiply the rest by a weight of zero, and 0 * NaN is NaN: a block that once held keys or values
of NaN spoils every later owner that does not overwrite it to its end. So each forward pass with
finetune rows is checked, and blocks with rows that are not finite are zeroed in the same step,
before the scheduler can hand them on.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from vllm_flexft.plan import Chunk
from vllm_flexft.train.activations import ActivationStore

BlockIds = tuple[list[int], ...]  # per KV-cache group


def diverged(chunks: Iterable[Chunk], store: ActivationStore, top: int) -> list[Chunk]:
    """Chunks whose final hidden states are not finite. A key or value that is not makes its own
    token's state so, since a token attends to itself."""
    return [chunk for chunk in chunks if not _is_finite(chunk, store, top)]


def _is_finite(chunk: Chunk, store: ActivationStore, top: int) -> bool:
    rows = store.window(chunk.lane, top, chunk.row, chunk.row + chunk.num_tokens)
    return bool(rows["residual_in"].isfinite().all())


def zero_blocks(
    chunks: Collection[Chunk],
    block_ids: Mapping[str, BlockIds],
    kv_cache_groups: Iterable[Any],
    layers: Mapping[str, Any],
) -> None:
    """Zero all blocks of the chunks' sequences in every layer.

    Args:
        block_ids: of each chunk, by request id.
        kv_cache_groups: vLLM's, in the order of the ids; name the attention layers.
        layers: vLLM's Attention layers by name; dimension 0 of their `kv_cache` is the block.
    """
    for index, group in enumerate(kv_cache_groups):
        blocks = sorted({block for c in chunks for block in block_ids[c.req_id][index]})
        for name in group.layer_names:
            layers[name].kv_cache[blocks] = 0
