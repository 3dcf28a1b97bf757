"""dX = dY W for base linears that vLLM may have repacked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def input_grad_of(base: Any) -> Callable[[Tensor], Tensor]:
    """(T, O) -> (T, I). Reads the plain weight where one is kept, else probes the layer once."""
    weight = getattr(base, "flexft_weight", None)
    if weight is None and base.weight.numel() > 0:
        weight = base.weight.data
    if weight is None:
        weight = probe_weight(base)
    plain: Tensor = weight
    return lambda dy: torch.mm(dy, plain)


def probe_weight(base: Any) -> Tensor:
    """W (O, I) of any linear, packed or quantised, from its response to identity rows.

    Exact where the layer computes x W^T without rounding x: each output is one product. The bias
    is left out of the call: taken off afterwards it would leave its rounding behind.
    """
    dtype = base.params_dtype
    identity = torch.eye(base.input_size, dtype=dtype)
    response: Tensor = base.quant_method.apply(base, identity, None)
    return response.T.contiguous()
