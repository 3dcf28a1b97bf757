"""`lora.grouped_lora_backward` in Triton: several adapters in one batch.

    t = dy B,   u = x Aᵀ                                   _project,   a tile of rows each
    dA = s tᵀ x,   dx += s t A;   dB = s dyᵀ u             _gradients, a tile of columns each

Grouping as in Punica, Chen et al. 2023, https://arxiv.org/abs/2310.18547. x and dy come from memory
once, for `_project`; the window that a slice works on then lies in the L2 cache (512 rows of 14336
bf16 numbers are 14 MiB of an H200's 50), where `_gradients` finds it. One program owns a tile of
dA or dB and goes through the rows in order: no atomics, the same bits at every run.
Legend: L adapters, n groups; C columns (I or O); others as in `flexft_kernels`.
"""

from collections.abc import Iterable

import torch
import triton
import triton.language as tl
from torch import Tensor

from flexft_kernels.lora import Lora

# Rows of a tile: the least that wgmma multiplies.
_ROWS = 64
# Columns that a program of `_project` sums over. 512 rows of 4096 columns make 64 programs, of
# 14336 columns 224, for an H200's 132 multiprocessors.
_SPLIT_COLUMNS = 512
# A tile of 64 rows of t or u fills half the registers of its program.
_RANKS = 256


def lora_backward(dy_TO: Tensor, x_TI: Tensor, lora: Lora, dx_TI: Tensor | None) -> None:
    """As the plain-torch op of this name, on operands of one dtype."""
    grouped_lora_backward(dy_TO, x_TI, lora[None], [(0, x_TI.shape[0], 0)], dx_TI)


def grouped_lora_backward(
    dy_TO: Tensor,
    x_TI: Tensor,
    loras: Lora,
    groups: Iterable[tuple[int, int, int]],
    dx_TI: Tensor | None,
) -> None:
    """As the plain-torch op of this name, on operands of one dtype.

    t and u are rounded to that dtype before they are multiplied again; all sums are fp32. Ranks
    are taken 256 at a time, with dx rounded after each.
    """
    assert loras.da.dtype == loras.db.dtype == torch.float32
    assert x_TI.dtype == dy_TO.dtype == loras.a.dtype == loras.b.dtype
    groups = list(groups)
    table = torch.tensor(groups, dtype=torch.int32).to(x_TI.device, non_blocking=True)
    rows = (table, max(stop - start for start, stop, _ in groups))
    for first in range(0, loras.a.shape[1], _RANKS):
        ranks = slice(first, first + _RANKS)
        a, b = loras.a[:, ranks].mT, loras.b[:, :, ranks]
        t_TR, u_TR = _project(dy_TO, b, *rows), _project(x_TI, a, *rows)
        _gradients(x_TI, t_TR, table, loras.scaling, loras.da[:, ranks].mT, a, dx_TI)
        _gradients(dy_TO, u_TR, table, loras.scaling, loras.db[:, :, ranks], None, None)


def _project(z_TC: Tensor, weight_LCR: Tensor, groups: Tensor, longest: int) -> Tensor:
    """Row by row, z times the weight of its group's adapter; (T, R) in z's dtype."""
    tokens, columns = z_TC.shape
    rank = weight_LCR.shape[2]
    splits = triton.cdiv(columns, _SPLIT_COLUMNS)
    parts = torch.empty(splits, tokens, rank, dtype=torch.float32, device=z_TC.device)
    block_rank = max(16, triton.next_power_of_2(rank))
    _project_kernel[triton.cdiv(longest, _ROWS), splits, len(groups)](
        z_TC,
        weight_LCR,
        parts,
        groups,
        tokens,
        columns,
        z_TC.stride(),
        weight_LCR.stride(),
        R=rank,
        BLOCK_R=block_rank,
        BLOCK_T=_ROWS,
        BLOCK_C=64,
        SPLIT=_SPLIT_COLUMNS,
        PRECISION=_precision(z_TC),
        num_warps=4,
        num_stages=3,
    )
    return parts.sum(0).to(z_TC.dtype)


def _gradients(
    z_TC: Tensor,
    small_TR: Tensor,
    groups: Tensor,
    scaling: float,
    grad_LCR: Tensor,
    weight_LCR: Tensor | None,
    dz_TC: Tensor | None,
) -> None:
    """Add s zᵀ small to the gradient of each adapter, and s small weightᵀ to dz if given."""
    columns, rank = grad_LCR.shape[1:]
    block_rank = max(16, triton.next_power_of_2(rank))
    # The accumulator, block_columns × block_rank, in registers: at most 64 a thread.
    block_columns = max(32, min(128, 8192 // block_rank))
    _gradients_kernel[triton.cdiv(columns, block_columns), len(groups)](
        z_TC,
        small_TR,
        groups,
        scaling,
        grad_LCR,
        weight_LCR,
        dz_TC,
        columns,
        z_TC.stride(),
        small_TR.stride(),
        grad_LCR.stride(),
        None if weight_LCR is None else weight_LCR.stride(),
        None if dz_TC is None else dz_TC.stride(),
        HAS_DZ=dz_TC is not None,
        R=rank,
        BLOCK_R=block_rank,
        BLOCK_T=_ROWS,
        BLOCK_C=block_columns,
        PRECISION=_precision(z_TC),
        num_warps=4,
        num_stages=2,
    )


def _precision(x: Tensor) -> str:
    return "tf32x3" if x.dtype == torch.float32 else "tf32"


@triton.jit
def _project_kernel(
    z,
    weight,
    parts,
    groups,
    tokens,
    columns,
    z_strides,
    weight_strides,
    R: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    group, split = tl.program_id(2), tl.program_id(1)
    row = tl.load(groups + 3 * group) + tl.program_id(0) * BLOCK_T
    stop = tl.load(groups + 3 * group + 1)
    if row >= stop:
        return
    weight += tl.load(groups + 3 * group + 2).to(tl.int64) * weight_strides[0]
    row_T = (row + tl.arange(0, BLOCK_T)).to(tl.int64)
    rank_R = tl.arange(0, BLOCK_R)
    valid_T, valid_R = row_T < stop, rank_R < R
    sum_TR = tl.zeros([BLOCK_T, BLOCK_R], tl.float32)
    for start in range(split * SPLIT, min(split * SPLIT + SPLIT, columns), BLOCK_C):
        column_C = start + tl.arange(0, BLOCK_C)
        valid_C = column_C < columns
        z_at = z + (row_T * z_strides[0])[:, None] + (column_C * z_strides[1])[None, :]
        z_TC = tl.load(z_at, mask=valid_T[:, None] & valid_C[None, :], other=0.0)
        weight_at = weight + (column_C * weight_strides[1])[:, None]
        weight_at += (rank_R * weight_strides[2])[None, :]
        weight_CR = tl.load(weight_at, mask=valid_C[:, None] & valid_R[None, :], other=0.0)
        sum_TR = tl.dot(z_TC, weight_CR, sum_TR, input_precision=PRECISION)
    part_at = parts + ((split * tokens + row_T) * R)[:, None] + rank_R[None, :]
    tl.store(part_at, sum_TR, mask=valid_T[:, None] & valid_R[None, :])


@triton.jit
def _gradients_kernel(
    z,
    small,
    groups,
    scaling,
    grad,
    weight,
    dz,
    columns,
    z_strides,
    small_strides,
    grad_strides,
    weight_strides,
    dz_strides,
    HAS_DZ: tl.constexpr,
    R: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PRECISION: tl.constexpr,
):
    group = tl.program_id(1)
    first, stop = tl.load(groups + 3 * group), tl.load(groups + 3 * group + 1)
    adapter = tl.load(groups + 3 * group + 2).to(tl.int64)
    column_C = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    rank_R = tl.arange(0, BLOCK_R)
    valid_C, valid_R = column_C < columns, rank_R < R
    mask_CR = valid_C[:, None] & valid_R[None, :]
    if HAS_DZ:
        weight_at = weight + adapter * weight_strides[0] + (column_C * weight_strides[1])[:, None]
        weight_at += (rank_R * weight_strides[2])[None, :]
        weight_CR = tl.load(weight_at, mask=mask_CR, other=0.0)
    sum_CR = tl.zeros([BLOCK_C, BLOCK_R], tl.float32)
    for row in range(first, stop, BLOCK_T):
        row_T = (row + tl.arange(0, BLOCK_T)).to(tl.int64)
        valid_T = row_T < stop
        mask_TC = valid_T[:, None] & valid_C[None, :]
        z_at = z + (row_T * z_strides[0])[:, None] + (column_C * z_strides[1])[None, :]
        z_TC = tl.load(z_at, mask=mask_TC, other=0.0)
        small_at = small + (row_T * small_strides[0])[:, None]
        small_at += (rank_R * small_strides[1])[None, :]
        small_TR = tl.load(small_at, mask=valid_T[:, None] & valid_R[None, :], other=0.0)
        sum_CR = tl.dot(tl.trans(z_TC), small_TR, sum_CR, input_precision=PRECISION)
        if HAS_DZ:
            dz_at = dz + (row_T * dz_strides[0])[:, None] + (column_C * dz_strides[1])[None, :]
            more_TC = tl.dot(small_TR, tl.trans(weight_CR), input_precision=PRECISION) * scaling
            dz_TC = tl.load(dz_at, mask=mask_TC, other=0.0).to(tl.float32) + more_TC
            tl.store(dz_at, dz_TC.to(dz.dtype.element_ty), mask=mask_TC)
    grad_at = grad + adapter * grad_strides[0] + (column_C * grad_strides[1])[:, None]
    grad_at += (rank_R * grad_strides[2])[None, :]
    tl.store(grad_at, tl.load(grad_at, mask=mask_CR) + sum_CR * scaling, mask=mask_CR)
