"""SwiGLU activation and its gradient.

    act = silu(gate) up,   silu(g) = g σ(g)
    dup = dact silu(gate),   dgate = dact up σ(gate) (1 + gate (1 - σ(gate)))

Shazeer 2020, https://arxiv.org/abs/2002.05202. gate is the first half of `gate_up_T2F` and up the
second, as in vLLM's merged linear. The forward rounds as vLLM's SiluAndMul on CPU does: silu in
the input's dtype, then the product.
"""

import torch
from torch import Tensor

# An op works on so many elements at a time: 4 tensors of 2¹⁷ fp32 elements are 2 MiB, near what a
# core's L2 cache holds, and 2¹⁷ is 4 times the grain at which torch starts a second thread.
_BLOCK_ELEMENTS = 1 << 17


def silu_mul(gate_up_T2F: Tensor, *, out: Tensor | None = None) -> Tensor:
    """silu(gate) * up. gate_up_T2F: (T, 2F). Returns (T, F) in its dtype, in `out` if given."""
    gate, up = gate_up_T2F.chunk(2, dim=-1)
    if out is None:
        out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    for rows in _row_blocks(gate):
        torch.ops.aten.silu.out(gate[rows], out=out[rows])
        out[rows].mul_(up[rows])
    return out


def silu_mul_backward(dact_TF: Tensor, gate_up_T2F: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Gradient of `silu_mul` with respect to gate and up.

    dact_TF: (T, F); gate_up_T2F: (T, 2F), both of one dtype. Returns (T, 2F) in that dtype, in
    `out` if given; `out` may not overlap the inputs.
    """
    gate, up = gate_up_T2F.chunk(2, dim=-1)
    if out is None:
        out = torch.empty(gate_up_T2F.shape, dtype=dact_TF.dtype, device=dact_TF.device)
    dgate_TF, dup_TF = out.chunk(2, dim=-1)
    for rows in _row_blocks(gate):
        dact, dgate, dup = dact_TF[rows], dgate_TF[rows], dup_TF[rows]
        torch.mul(dact, up[rows], out=dgate)
        torch.ops.aten.silu_backward.grad_input(dgate, gate[rows], grad_input=dgate)
        torch.ops.aten.silu.out(gate[rows], out=dup)
        dup.mul_(dact)
    return out


def _row_blocks(x_TF: Tensor) -> list[slice]:
    rows, width = x_TF.shape
    step = max(1, _BLOCK_ELEMENTS // max(width, 1))
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]
