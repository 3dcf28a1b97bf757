"""Attention of one sequence with its gradients in float64, for the tests of the attention ops."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Sequence:
    """Inputs of one sequence's attention and their float64 gradients."""

    dout: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    grads: tuple[Tensor, Tensor, Tensor]
    scale: float
    sliding_window: int | None


def sequence(tokens, heads, kv_heads, head_dim, sliding_window=None, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [heads, heads, kv_heads, kv_heads]
    dout, q, k, v = (
        torch.randn(tokens, n, head_dim, generator=generator).to(dtype) for n in shapes
    )
    scale = head_dim**-0.5
    distance = torch.arange(tokens)[:, None] - torch.arange(tokens)
    visible = distance >= 0
    if sliding_window is not None:
        visible &= distance < sliding_window
    with torch.enable_grad():
        leaves = [x.double().requires_grad_() for x in (q, k, v)]
        q64, k64, v64 = (
            x.repeat_interleave(heads // x.shape[1], dim=1).transpose(0, 1) for x in leaves
        )
        out = F.scaled_dot_product_attention(q64, k64, v64, attn_mask=visible, scale=scale)
        out = out.transpose(0, 1)
        grads = torch.autograd.grad(out, leaves, dout.double())
    return Sequence(dout, q, k, v, out.detach().to(dtype), grads, scale, sliding_window)


def error(case, grads):
    """Largest error over the largest value; where a query sees one key only dq and dk are zero."""
    return max(
        float((a.double() - b).abs().max() / b.abs().max().clamp_min(0.1))
        for a, b in zip(grads, case.grads, strict=True)
    )
