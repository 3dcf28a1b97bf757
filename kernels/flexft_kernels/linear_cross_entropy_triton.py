"""`linear_cross_entropy.linear_cross_entropy` with its softmax in Triton; GEMMs are the library's.

A program takes a row of logits twice: for maximum, sum and rank of the target, by the online
softmax of Milakov and Gimelshein 2018, https://arxiv.org/abs/1805.02867; then to write the gradient
over it, as Liger-Kernel does.
"""

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from flexft_kernels import linear_cross_entropy as plain

_BLOCK = 4096  # 16 numbers a thread at 8 warps


def _cross_entropy_(logits_NV: Tensor, targets_N: Tensor, loss_N: Tensor) -> Tensor:
    """Turn logits into softmax - onehot in place, fill loss_N; returns the number of hits."""
    num_rows, vocab = logits_NV.shape
    assert logits_NV.stride(1) == targets_N.stride(0) == loss_N.stride(0) == 1
    hits_N = torch.empty(num_rows, dtype=torch.int64, device=logits_NV.device)
    _cross_entropy_kernel[(num_rows,)](
        logits_NV,
        targets_N,
        loss_N,
        hits_N,
        logits_NV.stride(0),
        V=vocab,
        BLOCK=min(_BLOCK, triton.next_power_of_2(vocab)),
        num_warps=8,
    )
    return hits_N.sum()


@triton.jit
def _cross_entropy_kernel(
    logits, targets, loss, hits, stride, V: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    target = tl.load(targets + row)
    z_target = tl.load(logits + target).to(tl.float32)
    # Of all but the target: their sum is what softmax - 1 is at the target, with no cancellation.
    maximum = z_target
    others = 0.0
    num_better = 0
    for start in range(0, V, BLOCK):
        column_V = start + tl.arange(0, BLOCK)
        z_V = tl.load(logits + column_V, mask=column_V < V, other=float("-inf")).to(tl.float32)
        # argmax takes the first of equals.
        better_V = (z_V > z_target) | ((z_V == z_target) & (column_V < target))
        num_better += tl.sum(better_V.to(tl.int32), 0)
        new_maximum = tl.maximum(maximum, tl.max(z_V, 0))
        e_V = tl.where(column_V == target, 0.0, tl.exp(z_V - new_maximum))
        others = others * tl.exp(maximum - new_maximum) + tl.sum(e_V, 0)
        maximum = new_maximum
    total = others + tl.exp(z_target - maximum)
    tl.store(loss + row, tl.log(total) + maximum - z_target)
    tl.store(hits + row, tl.where(num_better == 0, 1, 0))
    for start in range(0, V, BLOCK):
        column_V = start + tl.arange(0, BLOCK)
        z_V = tl.load(logits + column_V, mask=column_V < V, other=float("-inf")).to(tl.float32)
        grad_V = tl.exp(z_V - maximum) / total
        grad_V = tl.where(column_V == target, -others / total, grad_V)
        tl.store(logits + column_V, grad_V.to(logits.dtype.element_ty), mask=column_V < V)


linear_cross_entropy = partial(plain.linear_cross_entropy, cross_entropy=_cross_entropy_)
