"""Rotary position embedding with rotated halves (NeoX style) and its gradient.

    y1 = x1 cos - x2 sin,   y2 = x2 cos + x1 sin

Su et al. 2021, https://arxiv.org/abs/2104.09864. A rotation is orthogonal, so the gradient is the
rotation by the opposite angle. cos and sin come as rows of the `cos_sin_cache` of vLLM's
RotaryEmbedding, one a token: cos in the first half, sin in the second; any scaling of the
frequencies or of the amplitude is in the cache. Products are formed in fp32 as in vLLM's kernel.
"""

import torch
from torch import Tensor


def apply_rope(x_THE: Tensor, cos_sin_TE: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Rotate the first `cos_sin_TE.shape[1]` dimensions of each head; the others pass through.

    x_THE: (T, H, E); cos_sin_TE: (T, rotary_dim), rotary_dim even and at most E. Returns (T, H, E)
    in x's dtype, written to `out` if given, which may be x itself.
    """
    return _rotate(x_THE, cos_sin_TE, 1.0, out)


def rope_backward(dy_THE: Tensor, cos_sin_TE: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Gradient of `apply_rope` with respect to x; same arguments, `out` may be dy itself."""
    return _rotate(dy_THE, cos_sin_TE, -1.0, out)


def _rotate(x_THE: Tensor, cos_sin_TE: Tensor, direction: float, out: Tensor | None) -> Tensor:
    rotary_dim = cos_sin_TE.shape[-1]
    if out is None:
        out = torch.empty_like(x_THE, memory_format=torch.contiguous_format)
    if out is not x_THE and rotary_dim < x_THE.shape[-1]:
        out[..., rotary_dim:] = x_THE[..., rotary_dim:]
    cos, sin = cos_sin_TE.float().unsqueeze(1).chunk(2, dim=-1)
    x1, x2 = x_THE[..., :rotary_dim].float().chunk(2, dim=-1)
    y1, y2 = out[..., :rotary_dim].chunk(2, dim=-1)
    # x1 is needed once more after y1 has been written over it, when out is x.
    x1_sin = x1 * sin
    if out.dtype == torch.float32:
        torch.mul(x1, cos, out=y1).addcmul_(x2, sin, value=-direction)
        torch.mul(x2, cos, out=y2).add_(x1_sin, alpha=direction)
    else:
        y1.copy_((x1 * cos).addcmul_(x2, sin, value=-direction))
        y2.copy_(x1_sin.mul_(direction).addcmul_(x2, cos))
    return out
