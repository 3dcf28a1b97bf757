"""`rows.copy_rows` in Triton: one launch of a fixed shape, whatever the rows are."""

import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024  # 8 numbers a thread at 4 warps: one 16-byte access of each in bf16


def copy_rows(source: Tensor, source_rows: Tensor, target: Tensor, target_rows: Tensor) -> None:
    """As the plain-torch op of this name; unlike it, it never waits for the device."""
    width = target.shape[1]
    assert source.stride(1) == target.stride(1) == 1
    assert source.shape[1] >= width
    _copy_rows[len(source_rows), triton.cdiv(width, _BLOCK)](
        source,
        source_rows,
        target,
        target_rows,
        source.stride(0),
        target.stride(0),
        WIDTH=width,
        BLOCK=_BLOCK,
        num_warps=4,
    )


@triton.jit
def _copy_rows(
    source,
    source_rows,
    target,
    target_rows,
    stride_source,
    stride_target,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    read = tl.load(source_rows + tl.program_id(0)).to(tl.int64)
    write = tl.load(target_rows + tl.program_id(0)).to(tl.int64)
    if (read < 0) | (write < 0):
        return
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(source + read * stride_source + column, mask=column < WIDTH)
    target_at = target + write * stride_target + column
    tl.store(target_at, values.to(target.dtype.element_ty), mask=column < WIDTH)
