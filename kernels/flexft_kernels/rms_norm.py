"""Root mean square normalization and its gradient.

    r = 1 / sqrt(mean(x²) + eps),   y = x r w,   dx = r (dy w) - x r³ mean(dy w x)

Zhang and Sennrich 2019, https://arxiv.org/abs/1910.07467. The forward rounds as
`vllm.ir.ops.rms_norm` and transformers' LlamaRMSNorm do (statistics in fp32, then a cast to the
weight's dtype, then the weight), so that what is recomputed equals what was served.
"""

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalize `x` (..., D) over its last dimension and multiply by `weight` (D,).

    Returns a tensor of x's shape and dtype. For the query-key norm pass x as (T, H, E).
    """
    x32 = x.float()
    r = torch.rsqrt(x32.pow(2).mean(dim=-1, keepdim=True) + eps)
    return (x32 * r).to(weight.dtype).mul_(weight).to(x.dtype)


def rms_norm_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    eps: float,
    *,
    out: Tensor | None = None,
    skip: Tensor | None = None,
) -> Tensor:
    """Gradient of the frozen-weight norm with respect to its input.

    dy, x: (..., D), of any float dtypes; weight: (D,). Returns dx (..., D) in x's dtype, or in
    `out`, whose dtype is free and which may be `dy` itself. skip: (..., D), the gradient that
    went past the norm along the residual; added before the result is rounded.
    """
    x32 = x.float()
    dim = x.shape[-1]
    r = torch.rsqrt(x32.pow(2).mean(dim=-1, keepdim=True) + eps)
    dn = torch.mul(dy, weight.float())
    along_x = torch.linalg.vecdot(dn, x32).unsqueeze_(-1).mul_(r.pow(3)).div_(dim)
    dx = dn.mul_(r).addcmul_(x32, along_x, value=-1.0)
    if skip is not None:
        dx.add_(skip)
    return dx.to(x.dtype) if out is None else out.copy_(dx)
