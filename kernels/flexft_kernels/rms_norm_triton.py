"""`rms_norm.rms_norm_backward` in Triton: one pass over dy, x and what is added.

A program holds whole rows in registers, many of them where they are short as in the query-key
norm, so x and dy are read once. The sum over a row has one owner.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# Numbers of a tile: 32 a thread at 4 warps, some 100 registers with x, dy and the weight in fp32.
_TILE = 4096


def rms_norm_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    eps: float,
    *,
    out: Tensor | None = None,
    skip: Tensor | None = None,
) -> Tensor:
    """As the plain-torch op of this name, for (T, D) and for (T, H, E)."""
    if out is None:
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
    heads = x.shape[1] if x.dim() == 3 else 1
    width = x.shape[-1]
    assert all(t is None or t.stride(-1) == 1 for t in (dy, x, out, skip))
    block_width = triton.next_power_of_2(width)
    block_rows = max(1, _TILE // block_width)
    num_rows = x.numel() // width
    _rms_norm_backward[(triton.cdiv(num_rows, block_rows),)](
        (dy, x, out, skip),
        tuple(_row_strides(t) for t in (dy, x, out, skip)),
        weight,
        eps,
        num_rows,
        HAS_SKIP=skip is not None,
        H=heads,
        D=width,
        BLOCK_ROWS=block_rows,
        BLOCK_D=block_width,
        num_warps=max(4, min(16, block_rows * block_width // 1024)),
    )
    return out


def _row_strides(x: Tensor | None) -> tuple[int, int]:
    """Of tokens and heads."""
    if x is None:
        return (0, 0)
    return (x.stride(0), x.stride(1) if x.dim() == 3 else 0)


@triton.jit
def _rms_norm_backward(
    tensors,
    strides,
    weight,
    eps,
    num_rows,
    HAS_SKIP: tl.constexpr,
    H: tl.constexpr,
    D: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    dy, x, out, skip = tensors
    dy_strides, x_strides, out_strides, skip_strides = strides
    row_T = (tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
    column_D = tl.arange(0, BLOCK_D)
    mask = (row_T < num_rows)[:, None] & (column_D < D)[None, :]
    token_T, head_T = row_T // H, row_T % H
    x_T = token_T * x_strides[0] + head_T * x_strides[1]
    dy_T = token_T * dy_strides[0] + head_T * dy_strides[1]
    x_TD = tl.load(x + x_T[:, None] + column_D[None, :], mask=mask, other=0.0).to(tl.float32)
    dy_TD = tl.load(dy + dy_T[:, None] + column_D[None, :], mask=mask, other=0.0).to(tl.float32)
    weight_D = tl.load(weight + column_D, mask=column_D < D, other=0.0).to(tl.float32)
    r_T = tl.rsqrt(tl.sum(x_TD * x_TD, 1) / D + eps)
    dn_TD = dy_TD * weight_D[None, :]
    along_T = tl.sum(dn_TD * x_TD, 1) * r_T * r_T * r_T / D
    dx_TD = dn_TD * r_T[:, None] - x_TD * along_T[:, None]
    if HAS_SKIP:
        skip_T = token_T * skip_strides[0] + head_T * skip_strides[1]
        dx_TD += tl.load(skip + skip_T[:, None] + column_D[None, :], mask=mask, other=0.0)
    out_T = token_T * out_strides[0] + head_T * out_strides[1]
    tl.store(out + out_T[:, None] + column_D[None, :], dx_TD.to(out.dtype.element_ty), mask=mask)
