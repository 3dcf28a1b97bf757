"""Backward of one decoder layer over one window of tokens, op by op, without autograd.

Runs what static analysis left of the layer (graph/prune.py): nothing below the lowest adapter, no
gradient that no one reads. Tensors that were not kept are formed again when first read, by the
ops of the forward.
Legend: W window tokens, T micro-batch tokens, D hidden, H query heads, K KV heads, E head dim,
F MLP width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flexft_kernels.ops import (
    attention_backward_varlen,
    lora_backward,
    rms_norm_backward,
    rope_backward,
    silu_mul_backward,
)
from vllm_flexft.graph.prune import LayerNeeds
from vllm_flexft.train.adapter import TrainableAdapter
from vllm_flexft.train.model import DecoderLayer, FrozenLinear, RMSNorm
from vllm_flexft.train.window import LayerForward, LayerInputs, WindowTensors


@dataclass(slots=True)
class LayerBackward:
    """One decoder layer with its adapters and what its backward has to do."""

    layer: DecoderLayer
    adapters: LayerForward
    needs: LayerNeeds

    @classmethod
    def of(cls, layer: DecoderLayer, adapter: TrainableAdapter, needs: LayerNeeds) -> LayerBackward:
        return cls(layer, LayerForward(layer, adapter), needs)

    def window(self, dy_WD: Tensor, inputs: LayerInputs) -> Tensor | None:
        """dY of the layer's output -> dX of its input, (W, D) fp32; None when no layer below
        reads it. The residual stream's gradient stays in fp32: every layer adds to it.

        Adds to the adapters' gradients and to the sums in `inputs.kv`.
        """
        tensors = WindowTensors(self.adapters, inputs)
        d_mid_WD = self._mlp(dy_WD, tensors)
        if d_mid_WD is None:
            return None
        d_attention = self._linear(self.layer.o_proj, d_mid_WD, tensors, "attention")
        if d_attention is None:
            return None
        return self._attention(d_attention, d_mid_WD, tensors, inputs)

    def _mlp(self, dy_WD: Tensor, tensors: WindowTensors) -> Tensor | None:
        """Through the MLP and past it; None when nothing before it is trained."""
        layer = self.layer
        dact_WF = self._linear(layer.down_proj, dy_WD, tensors, "act")
        if dact_WF is None:
            return None
        dgate_up_W2F = silu_mul_backward(dact_WF, tensors["gate_up"])
        dh_WD = self._linear(layer.gate_up_proj, dgate_up_W2F, tensors, "h_mlp")
        if dh_WD is None:
            return None
        return _through_norm(layer.post_norm, dh_WD, tensors["residual_mid"], dy_WD)

    def _attention(
        self, dout: Tensor, d_mid_WD: Tensor, tensors: WindowTensors, inputs: LayerInputs
    ) -> Tensor | None:
        layer, geometry = self.layer, self.layer.attention
        heads, kv_heads, dim = geometry.num_heads, geometry.num_kv_heads, geometry.head_dim
        window = dout.shape[0]
        dq_WHE = attention_backward_varlen(
            dout.view(window, heads, dim),
            tensors["q"],
            inputs.kv,
            None,
            inputs.segments,
            scale=geometry.scale,
            sliding_window=geometry.sliding_window,
        )
        rows = slice(inputs.start, inputs.start + window)
        dq_WHE = rope_backward(dq_WHE, tensors.cos_sin)
        dk_WKE = rope_backward(inputs.kv.dk_TKE[rows], tensors.cos_sin)
        if layer.q_norm is not None and layer.k_norm is not None:
            qkv = tensors["qkv"]
            q_raw = qkv[:, : heads * dim].reshape(window, heads, dim)
            k_raw = qkv[:, heads * dim : (heads + kv_heads) * dim].reshape(window, kv_heads, dim)
            dq_WHE = rms_norm_backward(dq_WHE, q_raw, layer.q_norm.weight, layer.q_norm.eps)
            dk_WKE = rms_norm_backward(dk_WKE, k_raw, layer.k_norm.weight, layer.k_norm.eps)
        dtype = layer.qkv_proj.dtype
        dqkv = torch.cat(
            [
                dq_WHE.reshape(window, -1).to(dtype),
                dk_WKE.reshape(window, -1).to(dtype),
                inputs.kv.dv_TKE[rows].reshape(window, -1).to(dtype),
            ],
            dim=1,
        )
        dh_WD = self._linear(layer.qkv_proj, dqkv, tensors, "h_attention")
        if dh_WD is None:
            return None
        return _through_norm(layer.input_norm, dh_WD, tensors["residual_in"], d_mid_WD)

    def _linear(
        self, linear: FrozenLinear, dy: Tensor, tensors: WindowTensors, x_name: str
    ) -> Tensor | None:
        """Backward of a base linear with input `x_name` and the adapters on it; dX only when it
        is read."""
        dy = dy.to(linear.dtype)
        dx = linear.input_grad(dy) if self._wants(x_name) else None
        for lora in self.adapters.parts(linear):
            lora_backward(dy[:, lora.part], tensors[x_name], lora.bypass, dx)
        return dx

    def _wants(self, tensor: str) -> bool:
        return tensor in self.needs.input_grads


def _through_norm(norm: RMSNorm, dh_WD: Tensor, x_WD: Tensor, skip_WD: Tensor) -> Tensor:
    """Gradient at a norm's input: through the norm, and past it along the residual, in fp32."""
    dx_WD = torch.empty_like(skip_WD)
    return rms_norm_backward(dh_WD, x_WD, norm.weight, norm.eps, out=dx_WD, skip=skip_WD)
