"""Gradient of causal attention for a window of queries against all keys of their sequence.

    P = softmax(scale Q Kᵀ),   dV = Pᵀ dO,   dP = dO Vᵀ,   dS = P (dP - rowsum(P dP))
    dQ = scale dS K,   dK = scale dSᵀ Q

Dao et al. 2022, https://arxiv.org/abs/2205.14135, appendix B.2, with whole rows of scores in
place of tiles: the rows of a few queries fit in cache, five GEMMs do nearly all the work, and the
softmax needs no saved statistics. Measured on CPU this takes 0.5 to 0.9 of the time of torch's
flash attention (forward, for the logsumexp, and backward), in fp32 and bf16 alike.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

# Rows of scores a head forms at a time (queries times G): enough for a GEMM, little waste above the
# diagonal. Measured at 64 to 192 rows and 1 to 8 MiB, S of 64 to 2048, E of 64 and 128.
_SCORE_ROWS = 96
# Heads are batched until their scores fill so many bytes: more would leave the L2 caches of two
# cores, less would be more and smaller calls.
_SCORE_BYTES = 2 << 20


Segment = tuple[int, int, int, int]  # row_start, row_stop, key_start, q_start: see KeysValues


@dataclass(frozen=True, slots=True)
class KeysValues:
    """Keys and values of the sequences that a window meets, and the sums of their gradients.

    A segment `(row_start, row_stop, key_start, q_start)` of the window says: its rows
    [row_start, row_stop) are the queries at positions from q_start on of a sequence whose gradients
    begin at row key_start of dk and dv, where sequences lie one after another.

    In a row, without a block table: k, v (T, K, E) have the rows of dk and dv. Paged: k, v
    (B, N, K, E) are views of a cache of B blocks of N tokens, and row i of `block_table` (n, M)
    lists the blocks of the sequence of segment i, those that no query sees being any valid ones.
    Any strides; dk_TKE, dv_TKE are fp32 and added to, only where some query attends.
    """

    k: Tensor
    v: Tensor
    dk_TKE: Tensor
    dv_TKE: Tensor
    block_table: Tensor | None = None

    def of_sequences(self, which: slice) -> "KeysValues":
        """With those rows of the block table: row i is then the sequence of segment i."""
        if self.block_table is None:
            return self
        return replace(self, block_table=self.block_table[which])

    def of_segment(self, index: int, key_start: int, num_keys: int) -> "KeysValues":
        """Its keys in a row, from the sequence's first to the window's last."""
        rows = slice(key_start, key_start + num_keys)
        grads = (self.dk_TKE[rows], self.dv_TKE[rows])
        if self.block_table is None:
            return KeysValues(self.k[rows], self.v[rows], *grads)
        blocks = self.block_table[index, : -(-num_keys // self.k.shape[1])]
        k, v = (x[blocks].flatten(0, 1)[:num_keys] for x in (self.k, self.v))
        return KeysValues(k, v, *grads)


def attention_backward(
    dout_WHE: Tensor,
    q_WHE: Tensor,
    kv: KeysValues,
    *,
    q_start: int,
    scale: float,
    sliding_window: int | None = None,
) -> Tensor:
    """Gradients of the attention of one window of one sequence.

    Query i of the window stands at position `q_start + i` and attends the keys at positions
    `<= q_start + i`, and `> q_start + i - sliding_window` if that is set.

    dout_WHE, q_WHE: (W, H, E), queries after rope and norm. kv: in a row, (S, K, E) with
    S >= q_start + W and H a multiple of K, of any float dtype. All arithmetic is in fp32: bf16
    GEMMs for the last three products were measured to save a tenth of the time and to cost four
    digits. Returns dq (W, H, E) in q's dtype.
    """
    window, num_heads = q_WHE.shape[:2]
    num_kv_heads = kv.k.shape[1]
    group = num_heads // num_kv_heads
    stop = q_start + window
    assert kv.block_table is None
    assert kv.k.shape[0] >= stop
    assert num_heads == group * num_kv_heads
    assert kv.dk_TKE.dtype == kv.dv_TKE.dtype == torch.float32
    block = max(1, _SCORE_ROWS // group)
    first_key = first_visible(q_start, sliding_window)
    score_bytes = 4 * block * group * min(stop - first_key, block + (sliding_window or stop))
    heads_at_once = max(1, _SCORE_BYTES // score_bytes)

    dq_WHE = torch.empty_like(q_WHE, memory_format=torch.contiguous_format)
    queries = q_WHE.unflatten(1, (num_kv_heads, group))
    douts = dout_WHE.unflatten(1, (num_kv_heads, group))
    dqs = dq_WHE.unflatten(1, (num_kv_heads, group))
    for head in range(0, num_kv_heads, heads_at_once):
        heads = slice(head, head + heads_at_once)
        k = _heads_first(kv.k[first_key:stop, heads])
        v = _heads_first(kv.v[first_key:stop, heads])
        dk = kv.dk_TKE[first_key:stop, heads].transpose(0, 1)
        dv = kv.dv_TKE[first_key:stop, heads].transpose(0, 1)
        for row in range(0, window, block):
            rows = slice(row, min(row + block, window))
            position = q_start + rows.start
            low = first_visible(position, sliding_window)
            keys = slice(low - first_key, q_start + rows.stop - first_key)
            q = _heads_first(queries[rows, heads]).mul_(scale)
            dout = _heads_first(douts[rows, heads])
            p = torch.bmm(q.flatten(1, 2), k[:, keys].mT)
            _mask(p.view(*q.shape[:3], -1), position - low, sliding_window)
            torch.softmax(p, dim=-1, out=p)
            ds = torch.bmm(dout.flatten(1, 2), v[:, keys].mT)
            dv[:, keys].baddbmm_(p.mT, dout.flatten(1, 2))
            torch.ops.aten._softmax_backward_data.out(ds, p, -1, torch.float32, grad_input=ds)
            dk[:, keys].baddbmm_(ds.mT, q.flatten(1, 2))  # q carries the scale
            dq = torch.bmm(ds, k[:, keys]).mul_(scale)
            dqs[rows, heads] = dq.view(q.shape).transpose(0, 1)
    return dq_WHE


def attention_backward_varlen(
    dout_THE: Tensor,
    q_THE: Tensor,
    kv: KeysValues,
    out_THE: Tensor | None,
    segments: Iterable[Segment],
    *,
    scale: float,
    sliding_window: int | None = None,
) -> Tensor:
    """`attention_backward` of a window that holds pieces of several sequences.

    Rows that no segment names get a zero dq. `out_THE`, the attention's output, is what tiled
    versions of this op take rowsum(P dP) from; it is not read here.
    """
    dq_THE = torch.zeros_like(q_THE, memory_format=torch.contiguous_format)
    for index, (row_start, row_stop, key_start, q_start) in enumerate(segments):
        rows = slice(row_start, row_stop)
        dq_THE[rows] = attention_backward(
            dout_THE[rows],
            q_THE[rows],
            kv.of_segment(index, key_start, q_start + row_stop - row_start),
            q_start=q_start,
            scale=scale,
            sliding_window=sliding_window,
        )
    return dq_THE


def first_visible(position: int, sliding_window: int | None) -> int:
    """Of those that a query at `position` attends."""
    return 0 if sliding_window is None else max(0, position - sliding_window + 1)


def _heads_first(x: Tensor) -> Tensor:
    """A contiguous fp32 copy with the head dimension, the second, in front."""
    x = x.transpose(0, 1)
    return torch.empty(x.shape, dtype=torch.float32, device=x.device).copy_(x)


def _mask(scores: Tensor, offset: int, sliding_window: int | None) -> None:
    """Fill with -inf what a query may not see.

    scores: (heads, n, G, keys): row r is the query `offset + r` keys after the first one. The
    last key is the last query's own.
    """
    n, num_keys = scores.shape[1], scores.shape[3]
    later = torch.ones(n, n, dtype=torch.bool, device=scores.device).triu_(1)
    scores[..., num_keys - n :].masked_fill_(later.unsqueeze(1), -torch.inf)
    if sliding_window is not None and (num_left := offset + n - sliding_window) > 0:
        left = torch.ones(n, num_left, dtype=torch.bool, device=scores.device)
        left.tril_(offset - sliding_window)
        scores[..., :num_left].masked_fill_(left.unsqueeze(1), -torch.inf)


def attention_varlen(
    q_THE: Tensor,
    kv: KeysValues,
    segments: Iterable[Segment],
    *,
    scale: float,
    sliding_window: int | None = None,
) -> Tensor:
    """Causal attention of a window, where the forward's output was not kept; (T, H, E).

    Arguments as of `attention_backward_varlen`. Torch's own attention does the work, a segment at
    a time, with a (queries, keys) mask.
    """
    out_THE = torch.empty_like(q_THE, memory_format=torch.contiguous_format)
    for index, (row_start, row_stop, key_start, q_start) in enumerate(segments):
        rows = slice(row_start, row_stop)
        first = first_visible(q_start, sliding_window)
        stop = q_start + row_stop - row_start
        keys = kv.of_segment(index, key_start, stop)
        position = torch.arange(q_start, stop, device=q_THE.device)[:, None]
        key = torch.arange(first, stop, device=q_THE.device)[None, :]
        visible = key <= position
        if sliding_window is not None:
            visible &= key > position - sliding_window
        out_THE[rows] = torch.nn.functional.scaled_dot_product_attention(
            q_THE[rows].transpose(0, 1)[None],
            keys.k[first:].transpose(0, 1)[None].to(q_THE.dtype),
            keys.v[first:].transpose(0, 1)[None].to(q_THE.dtype),
            attn_mask=visible,
            scale=scale,
            enable_gqa=True,
        )[0].transpose(0, 1)
    return out_THE
