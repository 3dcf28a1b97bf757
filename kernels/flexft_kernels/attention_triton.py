"""`attention.attention_backward_varlen` as two Triton kernels, keys and values paged or in a row.

FlashAttention-2's backward, Dao 2023, https://arxiv.org/abs/2307.08691, algorithm 2, in two passes
so that every sum has one owner and one order: no atomics, the same bits at every run.

    _query_side   a tile of queries against its keys: logsumexp and delta = rowsum(P dP), then dQ
    _key_side     a tile of keys against its queries: dK and dV, added to the fp32 accumulators

A forward that serves requests keeps no logsumexp, so it is formed again: 8 GEMMs of a tile where
the least is 5, one more where the attention's output was not kept either. A tile's rows are
(query, head of the group) pairs: the G heads that share a key head share its loads.
Legend: n segments, M blocks of a table, B blocks of the cache, N tokens a block; others as in
`flexft_kernels`.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from flexft_kernels.attention import KeysValues, Segment, first_visible


@dataclass(frozen=True)
class Tiles:
    """Rows (query, head) and keys of a tile, warps and pipeline stages of a kernel."""

    rows: int
    keys: int
    num_warps: int
    num_stages: int

    def launch(self) -> dict[str, int]:
        return {
            "BLOCK_M": self.rows,
            "BLOCK_N": self.keys,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
        }


def _tiles(block_dim: int, itemsize: int) -> tuple[Tiles, Tiles]:
    """Of `_query_side` and `_key_side`: the largest that were found to compile for sm_90 without
    spills. The accumulators, rows × E of dQ or 2 × keys × E of dK and dV, and two tiles of scores
    live in registers. Not tuned: no GPU has run them.
    """
    if itemsize == 4:  # three TF32 products for one
        return Tiles(16, 32, 4, 1), Tiles(16, 16, 4, 1)
    if block_dim <= 64:
        return Tiles(128, 64, 8, 3), Tiles(64, 128, 8, 3)
    if block_dim <= 128:
        return Tiles(128, 64, 8, 2), Tiles(64, 64, 8, 2)
    return Tiles(64, 32, 8, 2), Tiles(64, 32, 8, 1)


def attention_backward_varlen(
    dout_THE: Tensor,
    q_THE: Tensor,
    kv: KeysValues,
    out_THE: Tensor | None,
    segments: Iterable[Segment],
    *,
    scale: float,
    sliding_window: int | None = None,
    tiles: tuple[Tiles, Tiles] | None = None,
) -> Tensor:
    """As the plain-torch op of this name, on operands of one dtype; keys and values are read where
    they are.

    P and dS enter their GEMMs in that dtype, all sums are fp32. `out_THE`, where given, saves a
    GEMM. `tiles`, of `_query_side` and `_key_side`: for tests and tuning.
    """
    dout, q, segments = dout_THE, q_THE, list(segments)
    table = kv.block_table
    # In a row is one block, of all keys.
    k, v = (kv.k, kv.v) if table is not None else (kv.k[None], kv.v[None])
    tokens, heads, dim = q.shape
    kv_heads = k.shape[2]
    group = heads // kv_heads
    dk, dv = kv.dk_TKE, kv.dv_TKE
    assert heads == group * kv_heads
    assert dk.dtype == dv.dtype == torch.float32
    assert q.dtype == k.dtype == v.dtype == dout.dtype
    assert all(x.stride(-1) == 1 for x in (dout, q, k, v, dk, dv))
    block_dim = max(16, triton.next_power_of_2(dim))
    # Rows that no segment names get a zero gradient.
    dq = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    inputs = (
        (q, dout, k, v),
        (q.stride()[:2], dout.stride()[:2], k.stride()[:3], v.stride()[:3]),
        tuple(torch.empty(2, tokens, heads, dtype=torch.float32, device=q.device)),
        torch.tensor(segments, dtype=torch.int32).to(q.device, non_blocking=True),
        table,
        0 if table is None else table.stride(0),
        scale,
        sliding_window or 0,
    )
    constants = {
        "H": heads,
        "G": group,
        "E": dim,
        "BLOCK_E": block_dim,
        "PAGE": 0 if table is None else k.shape[1],
        "SLIDING": sliding_window is not None,
        "PRECISION": "tf32x3" if q.dtype == torch.float32 else "tf32",
    }
    query_side, key_side = tiles or _tiles(block_dim, q.element_size())
    rows = group * max(stop - start for start, stop, _, _ in segments)
    _query_side[triton.cdiv(rows, query_side.rows), kv_heads, len(segments)](
        *inputs,
        dq,
        None if out_THE is None else out_THE.view(tokens, heads, dim).contiguous(),
        **constants,
        HAS_OUT=out_THE is not None,
        **query_side.launch(),
    )
    key_tiles = max(
        triton.cdiv(q0 + stop - start, key_side.keys)
        - first_visible(q0, sliding_window) // key_side.keys
        for start, stop, _, q0 in segments
    )
    _key_side[key_tiles, kv_heads, len(segments)](
        *inputs,
        (dk, dv),
        (dk.stride()[:2], dv.stride()[:2]),
        **constants,
        **key_side.launch(),
    )
    return dq


@triton.jit
def _segment(segments, index):
    """First row of the window, number of rows, first key, position of the first query."""
    row_start = tl.load(segments + 4 * index)
    length = tl.load(segments + 4 * index + 1) - row_start
    return row_start, length, tl.load(segments + 4 * index + 2), tl.load(segments + 4 * index + 3)


@triton.jit
def _load(pointer, offset_M, valid_M, E: tl.constexpr, BLOCK_E: tl.constexpr):
    """Rows of E numbers, zero where not valid."""
    dim_E = tl.arange(0, BLOCK_E)
    mask = valid_M[:, None] & (dim_E < E)[None, :]
    return tl.load(pointer + offset_M[:, None] + dim_E[None, :], mask=mask, other=0.0)


@triton.jit
def _load_queries(
    tensors, strides, token_M, head_M, valid_M, E: tl.constexpr, BLOCK_E: tl.constexpr
):
    """q and dout of some rows."""
    q_at, dout_at = strides[0], strides[1]
    q_ME = _load(tensors[0], token_M * q_at[0] + head_M * q_at[1], valid_M, E, BLOCK_E)
    dout_ME = _load(tensors[1], token_M * dout_at[0] + head_M * dout_at[1], valid_M, E, BLOCK_E)
    return q_ME, dout_ME


@triton.jit
def _load_keys(
    tensors,
    strides,
    block_table,
    stride_table,
    key_start,
    pos_N,
    valid_N,
    PAGE: tl.constexpr,
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """k and v at the positions pos_N of the program's head and sequence."""
    k_at, v_at = strides[2], strides[3]
    # int64, for a cache may be large.
    if PAGE == 0:
        token_N = (key_start + pos_N).to(tl.int64)
        k_N, v_N = token_N * k_at[1], token_N * v_at[1]
    else:
        table = block_table + tl.program_id(2) * stride_table
        block_N = tl.load(table + pos_N // PAGE, mask=valid_N, other=0).to(tl.int64)
        slot_N = pos_N % PAGE
        k_N, v_N = block_N * k_at[0] + slot_N * k_at[1], block_N * v_at[0] + slot_N * v_at[1]
    kv_head = tl.program_id(1)
    k_NE = _load(tensors[2] + kv_head * k_at[2], k_N, valid_N, E, BLOCK_E)
    v_NE = _load(tensors[3] + kv_head * v_at[2], v_N, valid_N, E, BLOCK_E)
    return k_NE, v_NE


@triton.jit
def _scores(
    left, right, scale, query_pos, key_pos, window, SLIDING: tl.constexpr, PRECISION: tl.constexpr
):
    """left · rightᵀ to the base 2, -inf where the query does not see the key."""
    visible = key_pos <= query_pos
    if SLIDING:
        visible = visible & (key_pos > query_pos - window)
    # 2^(x log2 e) = e^x
    scores = tl.dot(left, tl.trans(right), input_precision=PRECISION) * (scale * 1.4426950408889634)
    return tl.where(visible, scores, float("-inf"))


@triton.jit
def _query_side(
    tensors,
    strides,
    stats,
    segments,
    block_table,
    stride_table,
    scale,
    window,
    dq,
    out,
    H: tl.constexpr,
    G: tl.constexpr,
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
    PAGE: tl.constexpr,
    SLIDING: tl.constexpr,
    PRECISION: tl.constexpr,
    HAS_OUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    # The last tiles see the most keys: they start first.
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    row_start, length, key_start, q_start = _segment(segments, tl.program_id(2))
    if tile * BLOCK_M >= length * G:
        return

    row_M = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    valid_M = row_M < length * G
    # Rows past the end stand where the last query does, so that every row sees a key.
    token_M = tl.minimum(row_M // G, length - 1)
    pos_M = q_start + token_M
    token_M = (row_start + token_M).to(tl.int64)
    head_M = tl.program_id(1) * G + row_M % G
    q_ME, dout_ME = _load_queries(tensors, strides, token_M, head_M, valid_M, E, BLOCK_E)
    first = 0
    if SLIDING:
        first = tl.maximum(0, q_start + tile * BLOCK_M // G - window + 1)
    stop = q_start + tl.minimum((tile + 1) * BLOCK_M - 1, length * G - 1) // G + 1

    max_M = tl.full([BLOCK_M], -1e30, tl.float32)
    sum_M = tl.zeros([BLOCK_M], tl.float32)
    delta_M = tl.zeros([BLOCK_M], tl.float32)
    for start in range(first, stop, BLOCK_N):
        pos_N = start + tl.arange(0, BLOCK_N)
        k_NE, v_NE = _load_keys(
            tensors, strides, block_table, stride_table, key_start, pos_N, pos_N < stop,
            PAGE, E, BLOCK_E,
        )  # fmt: skip
        s_MN = _scores(
            q_ME, k_NE, scale, pos_M[:, None], pos_N[None, :], window, SLIDING, PRECISION
        )
        new_max_M = tl.maximum(max_M, tl.max(s_MN, 1))
        p_MN = tl.exp2(s_MN - new_max_M[:, None])
        alpha_M = tl.exp2(max_M - new_max_M)
        sum_M = sum_M * alpha_M + tl.sum(p_MN, 1)
        if not HAS_OUT:
            dp_MN = tl.dot(dout_ME, tl.trans(v_NE), input_precision=PRECISION)
            delta_M = delta_M * alpha_M + tl.sum(p_MN * dp_MN, 1)
        max_M = new_max_M
    lse_M = max_M + tl.log2(sum_M)
    row_of_M = token_M * H + head_M
    if HAS_OUT:
        out_ME = _load(out, row_of_M * E, valid_M, E, BLOCK_E)
        delta_M = tl.sum(out_ME.to(tl.float32) * dout_ME.to(tl.float32), 1)
    else:
        delta_M = delta_M / sum_M
    tl.store(stats[0] + row_of_M, lse_M, mask=valid_M)
    tl.store(stats[1] + row_of_M, delta_M, mask=valid_M)

    dq_ME = tl.zeros([BLOCK_M, BLOCK_E], tl.float32)
    for start in range(first, stop, BLOCK_N):
        pos_N = start + tl.arange(0, BLOCK_N)
        k_NE, v_NE = _load_keys(
            tensors, strides, block_table, stride_table, key_start, pos_N, pos_N < stop,
            PAGE, E, BLOCK_E,
        )  # fmt: skip
        s_MN = _scores(
            q_ME, k_NE, scale, pos_M[:, None], pos_N[None, :], window, SLIDING, PRECISION
        )
        p_MN = tl.exp2(s_MN - lse_M[:, None])
        dp_MN = tl.dot(dout_ME, tl.trans(v_NE), input_precision=PRECISION)
        ds_MN = p_MN * (dp_MN - delta_M[:, None])
        dq_ME = tl.dot(ds_MN.to(k_NE.dtype), k_NE, dq_ME, input_precision=PRECISION)
    dim_E = tl.arange(0, BLOCK_E)
    dq_at = dq + (row_of_M * E)[:, None] + dim_E[None, :]
    mask = valid_M[:, None] & (dim_E < E)[None, :]
    tl.store(dq_at, (dq_ME * scale).to(dq.dtype.element_ty), mask=mask)


@triton.jit
def _key_side(
    tensors,
    strides,
    stats,
    segments,
    block_table,
    stride_table,
    scale,
    window,
    grads,
    grad_strides,
    H: tl.constexpr,
    G: tl.constexpr,
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
    PAGE: tl.constexpr,
    SLIDING: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    row_start, length, key_start, q_start = _segment(segments, tl.program_id(2))
    first = 0
    if SLIDING:
        first = tl.maximum(0, q_start - window + 1)
    start = (first // BLOCK_N + tl.program_id(0)) * BLOCK_N
    if start >= q_start + length:
        return

    pos_N = start + tl.arange(0, BLOCK_N)
    # Keys that no query of the window sees may be gone from the cache.
    valid_N = (pos_N < q_start + length) & (pos_N >= first)
    k_NE, v_NE = _load_keys(
        tensors, strides, block_table, stride_table, key_start, pos_N, valid_N, PAGE, E, BLOCK_E
    )

    first_row = tl.maximum(0, start - q_start) * G
    stop_row = length * G
    if SLIDING:
        stop_row = tl.minimum(stop_row, (start + BLOCK_N - 1 + window - q_start) * G)
    dk_NE = tl.zeros([BLOCK_N, BLOCK_E], tl.float32)
    dv_NE = tl.zeros([BLOCK_N, BLOCK_E], tl.float32)
    for row in range(first_row, stop_row, BLOCK_M):
        row_M = row + tl.arange(0, BLOCK_M)
        valid_M = row_M < stop_row
        # A row past the end stands before every key and sees none.
        pos_M = tl.where(valid_M, q_start + row_M // G, -1)
        token_M = (row_start + row_M // G).to(tl.int64)
        head_M = tl.program_id(1) * G + row_M % G
        q_ME, dout_ME = _load_queries(tensors, strides, token_M, head_M, valid_M, E, BLOCK_E)
        lse_M = tl.load(stats[0] + token_M * H + head_M, mask=valid_M, other=0.0)
        delta_M = tl.load(stats[1] + token_M * H + head_M, mask=valid_M, other=0.0)
        s_NM = _scores(
            k_NE, q_ME, scale, pos_M[None, :], pos_N[:, None], window, SLIDING, PRECISION
        )
        p_NM = tl.exp2(s_NM - lse_M[None, :])
        dv_NE = tl.dot(p_NM.to(dout_ME.dtype), dout_ME, dv_NE, input_precision=PRECISION)
        dp_NM = tl.dot(v_NE, tl.trans(dout_ME), input_precision=PRECISION)
        ds_NM = p_NM * (dp_NM - delta_M[None, :])
        dk_NE = tl.dot(ds_NM.to(q_ME.dtype), q_ME, dk_NE, input_precision=PRECISION)

    key_N = (key_start + pos_N).to(tl.int64)
    dim_E = tl.arange(0, BLOCK_E)
    mask = valid_N[:, None] & (dim_E < E)[None, :]
    dk_at, dv_at = grad_strides
    kv_head = tl.program_id(1)
    dk_NE_at = grads[0] + (key_N * dk_at[0] + kv_head * dk_at[1])[:, None] + dim_E[None, :]
    dv_NE_at = grads[1] + (key_N * dv_at[0] + kv_head * dv_at[1])[:, None] + dim_E[None, :]
    tl.store(dk_NE_at, tl.load(dk_NE_at, mask=mask) + dk_NE * scale, mask=mask)
    tl.store(dv_NE_at, tl.load(dv_NE_at, mask=mask) + dv_NE, mask=mask)
