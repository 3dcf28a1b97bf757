"""Reads keys and values back from vLLM's paged cache, per backend layout.

Legend: B blocks of the cache, n blocks read, K KV heads, N tokens a block, E head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

KVReader = Callable[[Tensor], tuple[Tensor, Tensor]]
KVPages = Callable[[], tuple[Tensor, Tensor]]


def kv_reader_for(attention: Any) -> KVReader:
    """(block ids (n,)) -> K and V, each (n * N, K, E). `attention` is vLLM's Attention layer.

    Raises ValueError for a cache format that cannot be read back exactly.
    """
    if attention.kv_cache_dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise ValueError(
            f"KV cache dtype {attention.kv_cache_dtype} cannot be co-finetuned: keys and values "
            "are read back for the backward pass; start the server with --kv-cache-dtype auto"
        )
    if attention.kv_cache.device.type != "cpu":
        return lambda block_ids: _read_rows(attention.kv_cache, block_ids)
    isa = getattr(attention, "isa", None)
    if isa not in ("vec", "vec16"):
        raise ValueError(
            f"the KV cache layout of vLLM's CPU attention '{isa}' is not readable yet; "
            "supported: vec, vec16"
        )
    return lambda block_ids: _read_cpu_vec(attention.kv_cache, block_ids)


def kv_pages_for(attention: Any) -> KVPages | None:
    """-> K and V of the whole cache, each a view (B, N, K, E), for ops that read it in place.

    None on CPU: its layout has no such view of K, and plain torch would gather the sequence again
    for every window where `kv_reader_for` is asked once a layer.
    """
    if attention.kv_cache.device.type == "cpu":
        return None
    return lambda: _pages(attention.kv_cache)


def _pages(kv_BKNE2: Tensor) -> tuple[Tensor, Tensor]:
    """CUDA backends: the logical view is (B, K, N, 2E) whatever the physical layout (read)."""
    k, v = kv_BKNE2.transpose(1, 2).chunk(2, dim=-1)
    return k, v


def _read_rows(kv_BKNE2: Tensor, block_ids: Tensor) -> tuple[Tensor, Tensor]:
    """The blocks' tokens in a row, of a cache as in `_pages`."""
    k, v = (pages[block_ids].flatten(0, 1) for pages in _pages(kv_BKNE2))
    return k, v


def _read_cpu_vec(kv_BKN2E: Tensor, block_ids: Tensor) -> tuple[Tensor, Tensor]:
    """vLLM's CPU cache: of each block and head the first N*E numbers are K, stored (E, N); the
    next N*E are V, stored (N, E)."""
    blocks, heads, tokens, double = kv_BKN2E.shape
    dim = double // 2
    halves = kv_BKN2E.view(blocks, heads, 2, tokens * dim)
    picked = halves[block_ids]  # (n, K, 2, N * E)
    k = picked[:, :, 0].view(-1, heads, dim, tokens).permute(0, 3, 1, 2)
    v = picked[:, :, 1].view(-1, heads, tokens, dim).permute(0, 2, 1, 3)
    return k.reshape(-1, heads, dim), v.reshape(-1, heads, dim)
