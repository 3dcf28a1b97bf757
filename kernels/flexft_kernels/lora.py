"""Gradient of a low-rank bypass, y = base(x) + s (x Aᵀ) Bᵀ.

    t = dy B,   dA = s tᵀ x,   dB = s dyᵀ (x Aᵀ),   dx += s t A

Hu et al. 2021, https://arxiv.org/abs/2106.09685. Products are formed with the rank as the first
dimension, (R, T) and (R, O): on CPU a GEMM whose last dimension is 8 is 3 to 10 times slower.
"""

from collections.abc import Iterable

import torch
from torch import Tensor


def lora_backward(
    dy_TO: Tensor,
    x_TI: Tensor,
    a_RI: Tensor,
    b_OR: Tensor,
    scaling: float,
    da_RI: Tensor,
    db_OR: Tensor,
    dx_TI: Tensor | None,
    *,
    xa_TR: Tensor | None = None,
) -> None:
    """Add the gradients of one adapter on one linear to `da_RI`, `db_OR` and `dx_TI`.

    dy_TO: (T, O); x_TI: (T, I), the linear's input; a_RI: (R, I); b_OR: (O, R), of any float
    dtypes and strides. da_RI, db_OR: fp32. dx_TI: (T, I), or None where nothing below is trained.
    xa_TR: x Aᵀ, if the caller has it. Sums over T run in fp32: rounding dA and dB of a window to
    bf16 before they are added up would cost more than bf16 operands do.
    """
    assert da_RI.dtype == db_OR.dtype == torch.float32
    # Upcasting once costs less than the GEMMs and serves two of them each.
    dy, x = dy_TO.float(), x_TI.float()
    a_fp32, b_RO = a_RI.float(), b_OR.t().float().contiguous()
    t_RT = torch.mm(b_RO, dy.t())
    da_RI.addmm_(t_RT, x, alpha=scaling)
    xa_RT = torch.mm(a_fp32, x.t()) if xa_TR is None else xa_TR.float().t()
    db_OR.t().add_(torch.mm(xa_RT, dy), alpha=scaling)
    if dx_TI is not None:
        t_TR = t_RT.t().to(dx_TI.dtype)
        dx_TI.addmm_(t_TR, a_RI.to(dx_TI.dtype), alpha=scaling)


def grouped_lora_backward(
    dy_TO: Tensor,
    x_TI: Tensor,
    a_LRI: Tensor,
    b_LOR: Tensor,
    groups: Iterable[tuple[int, int, int]],
    scaling: float,
    da_LRI: Tensor,
    db_LOR: Tensor,
    dx_TI: Tensor | None,
    *,
    xa_TR: Tensor | None = None,
) -> None:
    """`lora_backward` of a batch whose rows belong to several of L adapters.

    groups: `(row_start, row_stop, adapter)`, at most one for an adapter; rows of no group have
    none. a_LRI: (L, R, I); b_LOR: (L, O, R), adapters of lower rank being padded with zeros.
    """
    for start, stop, adapter in groups:
        rows = slice(start, stop)
        lora_backward(
            dy_TO[rows],
            x_TI[rows],
            a_LRI[adapter],
            b_LOR[adapter],
            scaling,
            da_LRI[adapter],
            db_LOR[adapter],
            None if dx_TI is None else dx_TI[rows],
            xa_TR=None if xa_TR is None else xa_TR[rows],
        )
