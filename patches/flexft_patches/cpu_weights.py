"""Patch of `dispatch_cpu_unquantized_gemm`: keeps the plain weight that the backward reads.

On CPU vLLM repacks the weight of every linear layer into oneDNN's layout and drops the plain one.
The backward needs dX = dY W with W plain, so it stays reachable as `layer.flexft_weight`.
"""

import functools

import torch

from flexft_patches.ledger import Patch, is_patched, mark

PATCH = Patch(
    target="vllm.model_executor.layers.utils:dispatch_cpu_unquantized_gemm",
    sha256="2ba18ce6108799daff304b5976257462ab1b2273f185bafa5285ea876590d152",
)


def install() -> None:
    """Give layers that are loaded from now on a `flexft_weight`. Idempotent.

    `flexft_weight` has shape (N, K): output features, input features. It is a plain attribute and
    not a parameter, so that neither weight loading nor `state_dict` sees it. An embedding or LM
    head keeps `weight`; there `flexft_weight` is the same storage.
    """
    from vllm.model_executor.layers import utils

    original = utils.dispatch_cpu_unquantized_gemm
    if is_patched(original):
        return

    @functools.wraps(original)
    def dispatch_cpu_unquantized_gemm(layer: torch.nn.Module, remove_weight: bool) -> None:
        # vLLM's original packs a copy and, for linears, replaces `layer.weight` by an empty
        # parameter; holding the tensor is all that is needed to keep it.
        weight = layer.weight.data
        original(layer, remove_weight)
        if weight.ndim == 2 and not weight.is_meta:
            layer.flexft_weight = weight

    utils.dispatch_cpu_unquantized_gemm = mark(dispatch_cpu_unquantized_gemm)
