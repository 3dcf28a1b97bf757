"""Gradient of a low-rank bypass, y = base(x) + s (x Aᵀ) Bᵀ.

    t = dy B,   dA = s tᵀ x,   dB = s dyᵀ (x Aᵀ),   dx += s t A

Hu et al. 2021, https://arxiv.org/abs/2106.09685. Products are formed with the rank as the first
dimension, (R, T) and (R, O): on CPU a GEMM whose last dimension is 8 is 3 to 10 times slower.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Lora:
    """An adapter on one linear and the sums of its gradients, which the ops add to.

    a: (R, I); b: (O, R), of any float dtypes and strides. da, db: fp32, of their shapes. Of several
    adapters: one more dimension in front, those of lower rank padded with zeros.
    """

    a: Tensor
    b: Tensor
    da: Tensor
    db: Tensor
    scaling: float = 1.0

    def __getitem__(self, adapter: int | None) -> "Lora":
        """That of several; `None`: several, of which this is the only one."""
        a, b, da, db = (x[adapter] for x in (self.a, self.b, self.da, self.db))
        return Lora(a, b, da, db, self.scaling)


def lora_backward(dy_TO: Tensor, x_TI: Tensor, lora: Lora, dx_TI: Tensor | None) -> None:
    """Add the gradients of one adapter on one linear to `lora.da`, `lora.db` and `dx_TI`.

    dy_TO: (T, O); x_TI: (T, I), the linear's input, of any float dtypes and strides. dx_TI: (T, I),
    or None where nothing below is trained. Sums over T run in fp32: rounding dA and dB of a window
    to bf16 before they are added up would cost more than bf16 operands do.
    """
    assert lora.da.dtype == lora.db.dtype == torch.float32
    # Upcasting once costs less than the GEMMs and serves two of them each.
    dy, x = dy_TO.float(), x_TI.float()
    b_RO = lora.b.t().float().contiguous()
    t_RT = torch.mm(b_RO, dy.t())
    lora.da.addmm_(t_RT, x, alpha=lora.scaling)
    xa_RT = torch.mm(lora.a.float(), x.t())
    lora.db.t().add_(torch.mm(xa_RT, dy), alpha=lora.scaling)
    if dx_TI is not None:
        t_TR = t_RT.t().to(dx_TI.dtype)
        dx_TI.addmm_(t_TR, lora.a.to(dx_TI.dtype), alpha=lora.scaling)


def grouped_lora_backward(
    dy_TO: Tensor,
    x_TI: Tensor,
    loras: Lora,
    groups: Iterable[tuple[int, int, int]],
    dx_TI: Tensor | None,
) -> None:
    """`lora_backward` of a batch whose rows belong to several adapters.

    groups: `(row_start, row_stop, adapter)`, at most one for an adapter; rows of no group have
    none.
    """
    for start, stop, adapter in groups:
        rows = slice(start, stop)
        dx = None if dx_TI is None else dx_TI[rows]
        lora_backward(dy_TO[rows], x_TI[rows], loras[adapter], dx)
