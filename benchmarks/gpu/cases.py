"""One launch of each Triton kernel at the shapes of a model, for compiling and for timing.

The shapes are those of a backward slice: a window of W tokens of a sequence of S, ranks and blocks
as usual. Legend as in `flexft_kernels`.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from flexft_kernels import (
    attention,
    attention_triton,
    linear_cross_entropy,
    linear_cross_entropy_triton,
    lora,
    lora_triton,
    rms_norm,
    rms_norm_triton,
    rope,
    rope_triton,
    rows,
    rows_triton,
    silu_mul,
    silu_mul_triton,
)


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Widths of a decoder layer and the tokens of a slice."""

    window: int
    sequence: int
    hidden: int
    mlp: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    rank: int
    block: int  # tokens of a block of the KV cache


LLAMA_8B = Shape(
    window=512,
    sequence=2048,
    hidden=4096,
    mlp=14336,
    heads=32,
    kv_heads=8,
    head_dim=128,
    vocab=128256,
    rank=16,
    block=16,
)
TINY = Shape(
    window=7,
    sequence=19,
    hidden=24,
    mlp=40,
    heads=4,
    kv_heads=2,
    head_dim=8,
    vocab=37,
    rank=4,
    block=4,
)


@dataclass(frozen=True)
class Case:
    """A kernel's op at a shape, the same in plain torch, and the work done: bytes and FLOP.

    `flop` counts what the gradient needs, not what a kernel computes twice.
    """

    name: str
    op: Callable[[], object]
    plain: Callable[[], object]
    num_bytes: float
    flop: float


def _normal(*shape: int, dtype: torch.dtype, device: str) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=device).normal_()


def attention_cases(shape: Shape, dtype: torch.dtype, device: str) -> Iterator[Case]:
    """A window at the end of its sequence; head sizes of Llama-3.2-1B, -8B and Gemma-2-9B."""
    dim = shape.head_dim
    yield _attention_case(shape, dim // 2, None, dtype, device)
    yield _attention_case(shape, dim, None, dtype, device)
    yield _attention_case(shape, dim, None, dtype, device, paged=False)
    yield _attention_case(shape, dim, shape.window, dtype, device)
    yield _attention_case(shape, dim * 2, shape.window, dtype, device)


def _attention_case(
    shape: Shape,
    dim: int,
    sliding_window: int | None,
    dtype: torch.dtype,
    device: str,
    *,
    paged: bool = True,
) -> Case:
    tokens, stop = shape.window, shape.sequence
    normal = partial(_normal, dtype=dtype, device=device)
    q, dout, out = (normal(tokens, shape.heads, dim) for _ in range(3))
    dk, dv = torch.zeros(2, stop, shape.kv_heads, dim, device=device)
    arguments = {
        "segments": [(0, tokens, 0, stop - tokens)],
        "scale": dim**-0.5,
        "sliding_window": sliding_window,
    }
    blocks = -(-stop // shape.block)
    # As vLLM's: heads before tokens, keys and values of a token side by side.
    cache = normal(blocks, shape.kv_heads, shape.block, 2 * dim).transpose(1, 2)
    k, v = cache[..., :dim], cache[..., dim:]
    table = None
    if paged:
        table = torch.arange(blocks, dtype=torch.int32, device=device).flip(0)[None]
    else:
        k, v = k.reshape(-1, shape.kv_heads, dim), v.reshape(-1, shape.kv_heads, dim)
    kv = attention.KeysValues(k, v, dk, dv, table)
    operands = (dout, q, kv, None if paged and sliding_window else out)
    seen = (sliding_window or stop - tokens / 2) * tokens  # pairs of query and key
    name = f"attention E={dim}" + (" sliding" if sliding_window else "") + " paged" * paged
    return Case(
        name,
        partial(attention_triton.attention_backward_varlen, *operands, **arguments),
        partial(attention.attention_backward_varlen, *operands, **arguments),
        num_bytes=3 * q.nbytes + 2 * stop * shape.kv_heads * dim * (dtype.itemsize + 2 * 4),
        flop=5 * 2 * seen * shape.heads * dim,
    )


def lora_cases(shape: Shape, dtype: torch.dtype, device: str) -> Iterator[Case]:
    """One adapter on the widest linears, and four in a batch."""
    wide = shape.rank * 8
    yield _lora_case(shape, shape.hidden, shape.mlp, shape.rank, 1, dtype, device)
    yield _lora_case(shape, shape.mlp, shape.hidden, shape.rank, 4, dtype, device)
    yield _lora_case(shape, shape.hidden, shape.hidden, wide, 1, dtype, device)


def _lora_case(
    shape: Shape,
    width_in: int,
    width_out: int,
    rank: int,
    adapters: int,
    dtype: torch.dtype,
    device: str,
) -> Case:
    tokens = shape.window
    normal = partial(_normal, dtype=dtype, device=device)
    x, dy, dx = normal(tokens, width_in), normal(tokens, width_out), normal(tokens, width_in)
    a, b = normal(adapters, rank, width_in), normal(adapters, width_out, rank)
    da, db = (torch.zeros(t.shape, device=device) for t in (a, b))
    borders = [tokens * i // adapters for i in range(adapters + 1)]
    groups = [(borders[i], borders[i + 1], i) for i in range(adapters)]
    arguments = (dy, x, lora.Lora(a, b, da, db), groups, dx)
    return Case(
        f"lora {width_in}->{width_out} R={rank} of {adapters}",
        partial(lora_triton.grouped_lora_backward, *arguments),
        partial(lora.grouped_lora_backward, *arguments),
        num_bytes=x.nbytes + dy.nbytes + 2 * dx.nbytes + 2 * (da.nbytes + db.nbytes),
        flop=2 * tokens * rank * (3 * width_in + 2 * width_out),
    )


def elementwise_cases(shape: Shape, dtype: torch.dtype, device: str) -> Iterator[Case]:
    """One pass over memory each; the norms in fp32 beside activations of `dtype`, as they run."""
    tokens, hidden, heads, dim = shape.window, shape.hidden, shape.heads, shape.head_dim
    normal = partial(_normal, dtype=dtype, device=device)
    x, dh, weight = normal(tokens, hidden), normal(tokens, hidden), normal(hidden)
    skip, out = torch.zeros(2, tokens, hidden, device=device)
    yield Case(
        "rms_norm + residual",
        partial(rms_norm_triton.rms_norm_backward, dh, x, weight, 1e-5, out=out, skip=skip),
        partial(rms_norm.rms_norm_backward, dh, x, weight, 1e-5, out=out, skip=skip),
        num_bytes=x.nbytes + dh.nbytes + skip.nbytes + out.nbytes,
        flop=0,
    )
    q, dq, q_weight = normal(tokens, heads, dim), normal(tokens, heads, dim), normal(dim)
    yield Case(
        "rms_norm of queries",
        partial(rms_norm_triton.rms_norm_backward, dq, q, q_weight, 1e-5, out=dq),
        partial(rms_norm.rms_norm_backward, dq, q, q_weight, 1e-5, out=dq),
        num_bytes=q.nbytes + 2 * dq.nbytes,
        flop=0,
    )
    cos_sin = normal(tokens, dim)
    yield Case(
        "rope",
        partial(rope_triton.rope_backward, dq, cos_sin, out=dq),
        partial(rope.rope_backward, dq, cos_sin, out=dq),
        num_bytes=2 * dq.nbytes + cos_sin.nbytes,
        flop=0,
    )
    dact, gate_up = normal(tokens, shape.mlp), normal(tokens, 2 * shape.mlp)
    d_gate_up = torch.empty_like(gate_up)
    yield Case(
        "silu_mul",
        partial(silu_mul_triton.silu_mul_backward, dact, gate_up, out=d_gate_up),
        partial(silu_mul.silu_mul_backward, dact, gate_up, out=d_gate_up),
        num_bytes=dact.nbytes + 2 * gate_up.nbytes,
        flop=0,
    )
    arena = normal(shape.sequence, hidden)
    read = torch.arange(tokens, device=device)
    write = torch.arange(tokens, device=device).flip(0)
    yield Case(
        "rows",
        partial(rows_triton.copy_rows, x, read, arena, write),
        partial(rows.copy_rows, x, read, arena, write),
        num_bytes=2 * x.nbytes,
        flop=0,
    )


def cross_entropy_cases(shape: Shape, dtype: torch.dtype, device: str) -> Iterator[Case]:
    rows_at_once = min(256, shape.window)
    h = _normal(shape.window, shape.hidden, dtype=dtype, device=device)
    head = _normal(shape.vocab, shape.hidden, dtype=dtype, device=device)
    targets = torch.arange(shape.window, device=device) % shape.vocab
    workspace = torch.empty(rows_at_once, shape.vocab, dtype=dtype, device=device)
    arguments = (h, head, targets, 1 / shape.window)
    options = {"row_block": rows_at_once, "workspace": workspace}
    yield Case(
        "linear_cross_entropy",
        partial(linear_cross_entropy_triton.linear_cross_entropy, *arguments, **options),
        partial(linear_cross_entropy.linear_cross_entropy, *arguments, **options),
        num_bytes=0,
        flop=2 * 2 * shape.window * shape.hidden * shape.vocab,
    )


GROUPS = {
    "attention": attention_cases,
    "lora": lora_cases,
    "elementwise": elementwise_cases,
    "cross_entropy": cross_entropy_cases,
}


def all_cases(shape: Shape, dtype: torch.dtype, device: str) -> Iterator[Case]:
    for cases in GROUPS.values():
        yield from cases(shape, dtype, device)
