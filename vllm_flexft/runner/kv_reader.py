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
    isa = str(getattr(attention, "isa", None))
    if (read := CPU_LAYOUTS.get(isa)) is None:
        raise ValueError(
            f"the KV cache layout of vLLM's CPU attention '{isa}' is not readable yet; "
            f"supported: {', '.join(CPU_LAYOUTS)}"
        )
    return lambda block_ids: read(attention.kv_cache, block_ids)


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
    """Of each block and head K is stored (E, N), V is stored (N, E)."""
    k_nKX, v_nKX, tokens, dim = _halves(kv_BKN2E, block_ids)
    heads = k_nKX.shape[1]
    k = k_nKX.view(-1, heads, dim, tokens).permute(0, 3, 1, 2)
    v = v_nKX.view(-1, heads, tokens, dim).permute(0, 2, 1, 3)
    return k.reshape(-1, heads, dim), v.reshape(-1, heads, dim)


def _read_cpu_amx(kv_BKN2E: Tensor, block_ids: Tensor) -> tuple[Tensor, Tensor]:
    """As the tiles of AMX multiply them, 16 columns of pairs along the inner dimension: K is stored
    (N / 16, E / 2, 16, 2), its pairs along E; V is stored (E / 16, N / 2, 16, 2), its pairs along
    N."""
    k_nKX, v_nKX, tokens, dim = _halves(kv_BKN2E, block_ids)
    heads = k_nKX.shape[1]
    k = k_nKX.view(-1, heads, tokens // 16, dim // 2, 16, 2).permute(0, 2, 4, 1, 3, 5)
    v = v_nKX.view(-1, heads, dim // 16, tokens // 2, 16, 2).permute(0, 3, 5, 1, 2, 4)
    return k.reshape(-1, heads, dim), v.reshape(-1, heads, dim)


def _halves(kv_BKN2E: Tensor, block_ids: Tensor) -> tuple[Tensor, Tensor, int, int]:
    """K and V of the blocks as vLLM's CPU cache holds them, each (n, K, N * E): of each block and
    head first all of K, then all of V; and N, E."""
    blocks, heads, tokens, double = kv_BKN2E.shape
    dim = double // 2
    picked = kv_BKN2E.view(blocks, heads, 2, tokens * dim)[block_ids]
    return picked[:, :, 0], picked[:, :, 1], tokens, dim


# By the instruction set that vLLM's CPU attention uses.
CPU_LAYOUTS = {"vec": _read_cpu_vec, "vec16": _read_cpu_vec, "amx": _read_cpu_amx}
