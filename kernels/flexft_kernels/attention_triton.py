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

from flexft_kernels.attention import first_visible


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
    k_TKE: Tensor,
    v_TKE: Tensor,
    out_THE: Tensor | None,
    segments: Iterable[tuple[int, int, int, int]],
    *,
    scale: float,
    sliding_window: int | None = None,
    dk_TKE: Tensor,
    dv_TKE: Tensor,
    tiles: tuple[Tiles, Tiles] | None = None,
) -> Tensor:
    """As the plain-torch op of this name, on operands of one dtype.

    P and dS enter their GEMMs in that dtype, all sums are fp32. `out_THE`, where given, saves a
    GEMM. `tiles`, of `_query_side` and `_key_side`: for tests and tuning.
    """
    inputs = (dout_THE, q_THE, k_TKE[None], v_TKE[None], None, out_THE)
    mask = (scale, sliding_window)
    return _backward(*inputs, list(segments), *mask, dk_TKE, dv_TKE, tiles)


def paged_attention_backward(
    dout_THE: Tensor,
    q_THE: Tensor,
    k_BNKE: Tensor,
    v_BNKE: Tensor,
    block_table_nM: Tensor,
    out_THE: Tensor | None,
    segments: Iterable[tuple[int, int, int, int]],
    *,
    scale: float,
    sliding_window: int | None = None,
    dk_TKE: Tensor,
    dv_TKE: Tensor,
    tiles: tuple[Tiles, Tiles] | None = None,
) -> Tensor:
    """As the plain-torch op of this name: keys and values are read where the server put them."""
    inputs = (dout_THE, q_THE, k_BNKE, v_BNKE, block_table_nM, out_THE)
    mask = (scale, sliding_window)
    return _backward(*inputs, list(segments), *mask, dk_TKE, dv_TKE, tiles)


def _backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_table: Tensor | None,
    out: Tensor | None,
    segments: list[tuple[int, int, int, int]],
    scale: float,
    sliding_window: int | None,
    dk: Tensor,
    dv: Tensor,
    tiles: tuple[Tiles, Tiles] | None,
) -> Tensor:
    tokens, heads, dim = q.shape
    kv_heads = k.shape[2]
    group = heads // kv_heads
    assert heads == group * kv_heads
    assert dk.dtype == dv.dtype == torch.float32
    assert q.dtype == k.dtype == v.dtype == dout.dtype
    assert all(x.stride(-1) == 1 for x in (dout, q, k, v, dk, dv))
    block_dim = max(16, triton.next_power_of_2(dim))
    # Rows that no segment names get a zero gradient.
    dq = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    lse, delta = torch.empty(2, tokens, heads, dtype=torch.float32, device=q.device)
    inputs = (
        (q, dout, k, v),
        (*q.stride()[:2], *dout.stride()[:2], *k.stride()[:3], *v.stride()[:3]),
        (lse, delta),
        torch.tensor(segments, dtype=torch.int32).to(q.device, non_blocking=True),
        block_table,
        0 if block_table is None else block_table.stride(0),
        scale,
        sliding_window or 0,
    )
    constants = {
        "H": heads,
        "G": group,
        "E": dim,
        "BLOCK_E": block_dim,
        "PAGE": 0 if block_table is None else k.shape[1],
        "SLIDING": sliding_window is not None,
        "PRECISION": "tf32x3" if q.dtype == torch.float32 else "tf32",
    }
    query_side, key_side = tiles or _tiles(block_dim, q.element_size())
    rows = group * max(stop - start for start, stop, _, _ in segments)
    _query_side[triton.cdiv(rows, query_side.rows), kv_heads, len(segments)](
        *inputs,
        dq,
        None if out is None else out.view(tokens, heads, dim).contiguous(),
        **constants,
        HAS_OUT=out is not None,
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
        (*dk.stride()[:2], *dv.stride()[:2]),
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
def _key_offsets(pos_N, valid_N, key_start, table, stride_b, stride_n, PAGE: tl.constexpr):
    """Where the rows of the keys at pos_N begin; int64, for a cache may be large."""
    if PAGE == 0:
        offset_N = (key_start + pos_N).to(tl.int64) * stride_n
    else:
        block_N = tl.load(table + pos_N // PAGE, mask=valid_N, other=0)
        offset_N = block_N.to(tl.int64) * stride_b + (pos_N % PAGE) * stride_n
    return offset_N


@triton.jit
def _load(pointer, offset_M, valid_M, E: tl.constexpr, BLOCK_E: tl.constexpr):
    """Rows of E numbers, zero where not valid."""
    dim_E = tl.arange(0, BLOCK_E)
    mask = valid_M[:, None] & (dim_E < E)[None, :]
    return tl.load(pointer + offset_M[:, None] + dim_E[None, :], mask=mask, other=0.0)


@triton.jit
def _visible(query_pos, key_pos, window, SLIDING: tl.constexpr):
    visible = key_pos <= query_pos
    if SLIDING:
        visible = visible & (key_pos > query_pos - window)
    return visible


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
    q, dout, k, v = tensors
    stride_qt, stride_qh, stride_dt, stride_dh = strides[0], strides[1], strides[2], strides[3]
    stride_kb, stride_kn, stride_kh = strides[4], strides[5], strides[6]
    stride_vb, stride_vn, stride_vh = strides[7], strides[8], strides[9]
    # The last tiles see the most keys: they start first.
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    kv_head = tl.program_id(1)
    row_start, length, key_start, q_start = _segment(segments, tl.program_id(2))
    if tile * BLOCK_M >= length * G:
        return
    table = block_table
    if PAGE != 0:
        table = block_table + tl.program_id(2) * stride_table
    k += kv_head * stride_kh
    v += kv_head * stride_vh

    row_M = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    valid_M = row_M < length * G
    # Rows past the end stand where the last query does, so that every row sees a key.
    token_M = tl.minimum(row_M // G, length - 1)
    pos_M = q_start + token_M
    token_M = (row_start + token_M).to(tl.int64)
    head_M = kv_head * G + row_M % G
    q_ME = _load(q, token_M * stride_qt + head_M * stride_qh, valid_M, E, BLOCK_E)
    dout_ME = _load(dout, token_M * stride_dt + head_M * stride_dh, valid_M, E, BLOCK_E)
    first = 0
    if SLIDING:
        first = tl.maximum(0, q_start + tile * BLOCK_M // G - window + 1)
    stop = q_start + tl.minimum((tile + 1) * BLOCK_M - 1, length * G - 1) // G + 1
    log2_scale = scale * 1.4426950408889634  # 2^(x log2 e) = e^x

    max_M = tl.full([BLOCK_M], -1e30, tl.float32)
    sum_M = tl.zeros([BLOCK_M], tl.float32)
    delta_M = tl.zeros([BLOCK_M], tl.float32)
    for start in range(first, stop, BLOCK_N):
        pos_N = start + tl.arange(0, BLOCK_N)
        valid_N = pos_N < stop
        k_N = _key_offsets(pos_N, valid_N, key_start, table, stride_kb, stride_kn, PAGE)
        k_NE = _load(k, k_N, valid_N, E, BLOCK_E)
        s_MN = tl.dot(q_ME, tl.trans(k_NE), input_precision=PRECISION) * log2_scale
        visible_MN = _visible(pos_M[:, None], pos_N[None, :], window, SLIDING)
        new_max_M = tl.maximum(max_M, tl.max(tl.where(visible_MN, s_MN, -1e30), 1))
        p_MN = tl.where(visible_MN, tl.exp2(s_MN - new_max_M[:, None]), 0.0)
        alpha_M = tl.exp2(max_M - new_max_M)
        sum_M = sum_M * alpha_M + tl.sum(p_MN, 1)
        if not HAS_OUT:
            v_N = _key_offsets(pos_N, valid_N, key_start, table, stride_vb, stride_vn, PAGE)
            v_NE = _load(v, v_N, valid_N, E, BLOCK_E)
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
        valid_N = pos_N < stop
        k_N = _key_offsets(pos_N, valid_N, key_start, table, stride_kb, stride_kn, PAGE)
        v_N = _key_offsets(pos_N, valid_N, key_start, table, stride_vb, stride_vn, PAGE)
        k_NE = _load(k, k_N, valid_N, E, BLOCK_E)
        v_NE = _load(v, v_N, valid_N, E, BLOCK_E)
        s_MN = tl.dot(q_ME, tl.trans(k_NE), input_precision=PRECISION) * log2_scale
        visible_MN = _visible(pos_M[:, None], pos_N[None, :], window, SLIDING)
        p_MN = tl.where(visible_MN, tl.exp2(s_MN - lse_M[:, None]), 0.0)
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
    q, dout, k, v = tensors
    stride_qt, stride_qh, stride_dt, stride_dh = strides[0], strides[1], strides[2], strides[3]
    stride_kb, stride_kn, stride_kh = strides[4], strides[5], strides[6]
    stride_vb, stride_vn, stride_vh = strides[7], strides[8], strides[9]
    kv_head = tl.program_id(1)
    row_start, length, key_start, q_start = _segment(segments, tl.program_id(2))
    first = 0
    if SLIDING:
        first = tl.maximum(0, q_start - window + 1)
    start = (first // BLOCK_N + tl.program_id(0)) * BLOCK_N
    if start >= q_start + length:
        return
    table = block_table
    if PAGE != 0:
        table = block_table + tl.program_id(2) * stride_table

    pos_N = start + tl.arange(0, BLOCK_N)
    # Keys that no query of the window sees may be gone from the cache.
    valid_N = (pos_N < q_start + length) & (pos_N >= first)
    k_N = _key_offsets(pos_N, valid_N, key_start, table, stride_kb, stride_kn, PAGE)
    v_N = _key_offsets(pos_N, valid_N, key_start, table, stride_vb, stride_vn, PAGE)
    k_NE = _load(k, k_N + kv_head * stride_kh, valid_N, E, BLOCK_E)
    v_NE = _load(v, v_N + kv_head * stride_vh, valid_N, E, BLOCK_E)
    log2_scale = scale * 1.4426950408889634

    first_row = tl.maximum(0, start - q_start) * G
    stop_row = length * G
    if SLIDING:
        stop_row = tl.minimum(stop_row, (start + BLOCK_N - 1 + window - q_start) * G)
    dk_NE = tl.zeros([BLOCK_N, BLOCK_E], tl.float32)
    dv_NE = tl.zeros([BLOCK_N, BLOCK_E], tl.float32)
    for row in range(first_row, stop_row, BLOCK_M):
        row_M = row + tl.arange(0, BLOCK_M)
        valid_M = row_M < stop_row
        pos_M = q_start + row_M // G
        token_M = (row_start + row_M // G).to(tl.int64)
        head_M = kv_head * G + row_M % G
        q_ME = _load(q, token_M * stride_qt + head_M * stride_qh, valid_M, E, BLOCK_E)
        dout_ME = _load(dout, token_M * stride_dt + head_M * stride_dh, valid_M, E, BLOCK_E)
        lse_M = tl.load(stats[0] + token_M * H + head_M, mask=valid_M, other=0.0)
        delta_M = tl.load(stats[1] + token_M * H + head_M, mask=valid_M, other=0.0)
        s_NM = tl.dot(k_NE, tl.trans(q_ME), input_precision=PRECISION) * log2_scale
        visible_NM = _visible(pos_M[None, :], pos_N[:, None], window, SLIDING) & valid_M[None, :]
        p_NM = tl.where(visible_NM, tl.exp2(s_NM - lse_M[None, :]), 0.0)
        dv_NE = tl.dot(p_NM.to(dout_ME.dtype), dout_ME, dv_NE, input_precision=PRECISION)
        dp_NM = tl.dot(v_NE, tl.trans(dout_ME), input_precision=PRECISION)
        ds_NM = p_NM * (dp_NM - delta_M[None, :])
        dk_NE = tl.dot(ds_NM.to(q_ME.dtype), q_ME, dk_NE, input_precision=PRECISION)

    dk, dv = grads
    key_N = (key_start + pos_N).to(tl.int64)
    dim_E = tl.arange(0, BLOCK_E)
    mask = valid_N[:, None] & (dim_E < E)[None, :]
    dk_at = dk + (key_N * grad_strides[0] + kv_head * grad_strides[1])[:, None] + dim_E[None, :]
    dv_at = dv + (key_N * grad_strides[2] + kv_head * grad_strides[3])[:, None] + dim_E[None, :]
    tl.store(dk_at, tl.load(dk_at, mask=mask) + dk_NE * scale, mask=mask)
    tl.store(dv_at, tl.load(dv_at, mask=mask) + dv_NE, mask=mask)
