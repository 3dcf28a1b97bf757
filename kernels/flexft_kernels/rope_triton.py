"""`rope.apply_rope` and its gradient in Triton: each number is read and written once.

A tile is some (token, head) rows. Both halves of a row are read before either is written, so that
the result may lie where the input did.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# Numbers of each half in a tile, 16 a thread at 4 warps.
_TILE = 2048


def apply_rope(x_THE: Tensor, cos_sin_TE: Tensor, *, out: Tensor | None = None) -> Tensor:
    """As the plain-torch op of this name."""
    return _rotate(x_THE, cos_sin_TE, 1.0, out)


def rope_backward(dy_THE: Tensor, cos_sin_TE: Tensor, *, out: Tensor | None = None) -> Tensor:
    """As the plain-torch op of this name."""
    return _rotate(dy_THE, cos_sin_TE, -1.0, out)


def _rotate(x_THE: Tensor, cos_sin_TE: Tensor, direction: float, out: Tensor | None) -> Tensor:
    tokens, heads, dim = x_THE.shape
    rotary_dim = cos_sin_TE.shape[-1]
    if out is None:
        out = torch.empty_like(x_THE, memory_format=torch.contiguous_format)
    if out is not x_THE and rotary_dim < dim:
        out[..., rotary_dim:] = x_THE[..., rotary_dim:]
    assert x_THE.stride(-1) == out.stride(-1) == cos_sin_TE.stride(-1) == 1
    block_half = triton.next_power_of_2(rotary_dim // 2)
    block_rows = max(1, _TILE // block_half)
    _rotate_kernel[(triton.cdiv(tokens * heads, block_rows),)](
        x_THE,
        cos_sin_TE,
        out,
        direction,
        tokens * heads,
        x_THE.stride()[:2],
        cos_sin_TE.stride(0),
        out.stride()[:2],
        H=heads,
        HALF=rotary_dim // 2,
        BLOCK_ROWS=block_rows,
        BLOCK_HALF=block_half,
        num_warps=4,
    )
    return out


@triton.jit
def _rotate_kernel(
    x,
    cos_sin,
    out,
    direction,
    num_rows,
    x_strides,
    cos_sin_stride,
    out_strides,
    H: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
):
    row_T = (tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
    dim_E = tl.arange(0, BLOCK_HALF)
    mask = (row_T < num_rows)[:, None] & (dim_E < HALF)[None, :]
    token_T, head_T = row_T // H, row_T % H
    x_at = x + (token_T * x_strides[0] + head_T * x_strides[1])[:, None] + dim_E[None, :]
    cos_at = cos_sin + (token_T * cos_sin_stride)[:, None] + dim_E[None, :]
    x1_TE = tl.load(x_at, mask=mask, other=0.0).to(tl.float32)
    x2_TE = tl.load(x_at + HALF, mask=mask, other=0.0).to(tl.float32)
    cos_TE = tl.load(cos_at, mask=mask, other=0.0).to(tl.float32)
    sin_TE = tl.load(cos_at + HALF, mask=mask, other=0.0).to(tl.float32) * direction
    out_at = out + (token_T * out_strides[0] + head_T * out_strides[1])[:, None] + dim_E[None, :]
    y1_TE, y2_TE = x1_TE * cos_TE - x2_TE * sin_TE, x2_TE * cos_TE + x1_TE * sin_TE
    tl.store(out_at, y1_TE.to(out.dtype.element_ty), mask=mask)
    tl.store(out_at + HALF, y2_TE.to(out.dtype.element_ty), mask=mask)
