"""Backward of one decoder layer over one window of tokens, op by op, without autograd.

Mirrors the forward of `graph/families.py` from bottom to top. Only what some trainable adapter
needs is computed: nothing below the lowest adapter, no dX that no one reads.
Legend: W window tokens, T micro-batch tokens, D hidden, H query heads, K KV heads, E head dim,
F MLP width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flexft_kernels.attention import attention_backward_varlen
from flexft_kernels.lora import lora_backward
from flexft_kernels.rms_norm import rms_norm, rms_norm_backward
from flexft_kernels.rope import apply_rope, rope_backward
from flexft_kernels.silu_mul import silu_mul, silu_mul_backward
from vllm_flexft.train.adapter import LoraLinear, TrainableAdapter
from vllm_flexft.train.model import DecoderLayer, FrozenLinear, RMSNorm

ATTENTION_INPUTS = ("qkv_proj",)
MLP_LINEARS = ("gate_up_proj", "down_proj")


@dataclass(slots=True)
class LayerInputs:
    """What the window's backward reads: captured rows and the layer's keys and values.

    `captured` lacks what the plan recomputes.
    """

    captured: dict[str, Tensor]  # name -> (W, width)
    positions: Tensor  # (W,) position of each token in its sequence
    segments: list[tuple[int, int, int, int]]  # (row start, row stop, key start, q start)
    start: int  # first token of the window in the micro-batch
    k_TKE: Tensor
    v_TKE: Tensor
    dk_TKE: Tensor  # fp32, accumulated over the layer's windows
    dv_TKE: Tensor


class LayerBackward:
    """One decoder layer with its adapters. `below`: layers below need this layer's dX."""

    def __init__(self, layer: DecoderLayer, adapter: TrainableAdapter) -> None:
        self.layer = layer
        self.adapters = adapter.linears.get(layer.index, {})
        self.below = layer.index > adapter.lowest_layer
        self.needs_qkv = self.below or "qkv_proj" in self.adapters
        self.needs_attention = self.needs_qkv or "o_proj" in self.adapters

    def window(self, dy_WD: Tensor, inputs: LayerInputs) -> Tensor | None:
        """dY of the layer's output -> dX of its input, (W, D) fp32; None when no layer below
        reads it. The residual stream's gradient stays in fp32: every layer adds to it.

        Adds to the adapters' gradients and to `inputs.dk_TKE`, `inputs.dv_TKE`.
        """
        x_mid_WD = inputs.captured["residual_mid"]
        d_mid_WD = self._mlp(dy_WD, x_mid_WD, inputs.captured.get("gate_up"))
        if d_mid_WD is None:
            return None
        d_attention = self._linear(
            self.layer.o_proj, d_mid_WD, inputs.captured["attention"], self.needs_qkv
        )
        if d_attention is None:
            return None
        return self._attention(d_attention, d_mid_WD, inputs)

    def _mlp(self, dy_WD: Tensor, x_WD: Tensor, gate_up_W2F: Tensor | None) -> Tensor | None:
        layer = self.layer
        needs_dx = self.needs_attention
        if not needs_dx and not any(name in self.adapters for name in MLP_LINEARS):
            return None
        h_WD = None
        if gate_up_W2F is None or "gate_up_proj" in self.adapters:
            h_WD = rms_norm(x_WD, layer.post_norm.weight, layer.post_norm.eps)
        if gate_up_W2F is None:
            gate_up_W2F = self._forward(layer.gate_up_proj, h_WD)
        act_WF = silu_mul(gate_up_W2F) if "down_proj" in self.adapters else None
        needs_gate_up = needs_dx or "gate_up_proj" in self.adapters
        dact_WF = self._linear(layer.down_proj, dy_WD, act_WF, needs_gate_up)
        if dact_WF is None:
            return None
        dgate_up_W2F = silu_mul_backward(dact_WF, gate_up_W2F)
        dh_WD = self._linear(layer.gate_up_proj, dgate_up_W2F, h_WD, needs_dx)
        if dh_WD is None:
            return None
        return _through_norm(layer.post_norm, dh_WD, x_WD, dy_WD)

    def _attention(self, dout_WHE: Tensor, d_mid_WD: Tensor, inputs: LayerInputs) -> Tensor | None:
        layer, geometry = self.layer, self.layer.attention
        heads, kv_heads, dim = geometry.num_heads, geometry.num_kv_heads, geometry.head_dim
        window = dout_WHE.shape[0]
        x_WD = inputs.captured["residual_in"]
        qkv = inputs.captured.get("qkv")
        h_WD = None
        if qkv is None or "qkv_proj" in self.adapters:
            h_WD = rms_norm(x_WD, layer.input_norm.weight, layer.input_norm.eps)
        if qkv is None:
            qkv = self._forward(layer.qkv_proj, h_WD)
        cos_sin_WE = geometry.cos_sin_cache[inputs.positions]

        q_raw_WHE = qkv[:, : heads * dim].reshape(window, heads, dim)
        q_WHE = q_raw_WHE
        if layer.q_norm is not None:
            q_WHE = rms_norm(q_raw_WHE, layer.q_norm.weight, layer.q_norm.eps)
        q_WHE = apply_rope(q_WHE, cos_sin_WE)
        dq_WHE = attention_backward_varlen(
            dout_WHE.view(window, heads, dim),
            q_WHE,
            inputs.k_TKE,
            inputs.v_TKE,
            inputs.captured["attention"].view(window, heads, dim),
            inputs.segments,
            scale=geometry.scale,
            sliding_window=geometry.sliding_window,
            dk_TKE=inputs.dk_TKE,
            dv_TKE=inputs.dv_TKE,
        )
        rows = slice(inputs.start, inputs.start + window)
        dtype = layer.qkv_proj.dtype
        dq_WHE = rope_backward(dq_WHE, cos_sin_WE)
        dk_WKE = rope_backward(inputs.dk_TKE[rows], cos_sin_WE)
        if layer.q_norm is not None and layer.k_norm is not None:
            k_raw_WKE = qkv[:, heads * dim : (heads + kv_heads) * dim]
            k_raw_WKE = k_raw_WKE.reshape(window, kv_heads, dim)
            dq_WHE = rms_norm_backward(dq_WHE, q_raw_WHE, layer.q_norm.weight, layer.q_norm.eps)
            dk_WKE = rms_norm_backward(dk_WKE, k_raw_WKE, layer.k_norm.weight, layer.k_norm.eps)
        dqkv = torch.cat(
            [
                dq_WHE.reshape(window, -1).to(dtype),
                dk_WKE.reshape(window, -1).to(dtype),
                inputs.dv_TKE[rows].reshape(window, -1).to(dtype),
            ],
            dim=1,
        )
        dh_WD = self._linear(layer.qkv_proj, dqkv, h_WD, self.below)
        if dh_WD is None:
            return None
        return _through_norm(layer.input_norm, dh_WD, x_WD, d_mid_WD)

    def _linear(
        self, linear: FrozenLinear, dy: Tensor, x: Tensor | None, needs_dx: bool
    ) -> Tensor | None:
        """Backward of a base linear and the adapters on it; dX only when it is read."""
        dy = dy.to(linear.dtype)
        dx = linear.input_grad(dy) if needs_dx else None
        for lora in self._parts(linear):
            assert x is not None
            lora_backward(
                dy[:, lora.part],
                x,
                lora.slot.a,
                lora.slot.b,
                1.0,  # the slot's B carries the scaling
                lora.grad_a,
                lora.grad_b,
                dx,
            )
        return dx

    def _forward(self, linear: FrozenLinear, x: Tensor | None) -> Tensor:
        """Recompute what was not kept."""
        assert x is not None
        y = linear.apply(x)
        for lora in self._parts(linear):
            y[:, lora.part] += (x @ lora.slot.a.T) @ lora.slot.b.T
        return y

    def _parts(self, linear: FrozenLinear) -> list[LoraLinear]:
        return self.adapters.get(linear.name.rsplit(".", 1)[-1], [])


def _through_norm(norm: RMSNorm, dh_WD: Tensor, x_WD: Tensor, skip_WD: Tensor) -> Tensor:
    """Gradient at a norm's input: through the norm, and past it along the residual, in fp32."""
    dx_WD = torch.empty_like(skip_WD)
    return rms_norm_backward(dh_WD, x_WD, norm.weight, norm.eps, out=dx_WD).add_(skip_WD)
