"""The ops that training calls, by device: Triton for tensors on a CUDA device, else plain torch.

The device of an op's first argument decides, at each call. Ops made of GEMMs have their Triton
kernels for half precision; in fp32, where only comparisons run, they stay with torch.
"""

from collections.abc import Callable
from functools import cache, wraps
from importlib import import_module
from typing import ParamSpec, TypeVar

import torch

from flexft_kernels import attention, lora, rms_norm, rope, rows, silu_mul
from flexft_kernels import linear_cross_entropy as loss

P = ParamSpec("P")
R = TypeVar("R")


def _by_device(plain: Callable[P, R], *, half_only: bool = False) -> Callable[P, R]:
    """`plain`, or its twin of the same name in the module beside it, which needs triton."""

    @cache
    def twin() -> Callable[P, R]:
        return getattr(import_module(f"{plain.__module__}_triton"), plain.__name__)

    @wraps(plain)
    def op(*args: P.args, **kwargs: P.kwargs) -> R:
        first = args[0]
        assert isinstance(first, torch.Tensor)
        return (twin() if _has_kernel(first, half_only) else plain)(*args, **kwargs)

    return op


def _has_kernel(first: torch.Tensor, half_only: bool) -> bool:
    return first.is_cuda and not (half_only and first.dtype == torch.float32)


attention_backward_varlen = _by_device(attention.attention_backward_varlen, half_only=True)
lora_backward = _by_device(lora.lora_backward, half_only=True)
grouped_lora_backward = _by_device(lora.grouped_lora_backward, half_only=True)
linear_cross_entropy = _by_device(loss.linear_cross_entropy)
rms_norm_backward = _by_device(rms_norm.rms_norm_backward)
apply_rope = _by_device(rope.apply_rope)
rope_backward = _by_device(rope.rope_backward)
silu_mul_backward = _by_device(silu_mul.silu_mul_backward)
copy_rows = _by_device(rows.copy_rows)
