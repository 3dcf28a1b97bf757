"""Tensors of one layer over one window: kept ones, and the rest formed again when first read."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from flexft_kernels.attention import KeysValues, Segment, attention_varlen
from flexft_kernels.ops import apply_rope
from flexft_kernels.rms_norm import rms_norm
from flexft_kernels.silu_mul import silu_mul
from vllm_flexft.train.adapter import LoraLinear, TrainableAdapter
from vllm_flexft.train.model import DecoderLayer, FrozenLinear, RMSNorm


@dataclass(slots=True)
class LayerInputs:
    """What the window's backward reads: kept rows and the layer's keys and values."""

    kept: dict[str, Tensor]  # name -> (W, width); lacks what the plan recomputes
    positions: Tensor  # (W,) position of each token in its sequence
    segments: list[Segment]
    start: int  # first token of the window in the micro-batch
    kv: KeysValues  # of those sequences; gradients accumulate over the layer's windows


class LayerForward:
    """The layer's linears with their adapters, as the served forward computes them."""

    def __init__(self, layer: DecoderLayer, adapter: TrainableAdapter) -> None:
        self.layer = layer
        self._parts = adapter.linears.get(layer.index, {})

    def parts(self, linear: FrozenLinear) -> list[LoraLinear]:
        return self._parts.get(linear.name.rsplit(".", 1)[-1], [])

    def linear(self, linear: FrozenLinear, x: Tensor) -> Tensor:
        y = linear.apply(x)
        for lora in self.parts(linear):
            y[:, lora.part] += (x @ lora.slot.a.T) @ lora.slot.b.T
        return y


class WindowTensors:
    """`tensors["q"]` and so on, by the names of graph/families.py; each is formed at most once."""

    def __init__(self, forward: LayerForward, inputs: LayerInputs) -> None:
        self._forward, self._inputs = forward, inputs
        self._layer = forward.layer
        self._have = dict(inputs.kept)
        self.cos_sin = self._layer.attention.cos_sin_cache[inputs.positions]  # (W, E)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._have:
            self._have[name] = getattr(self, f"_{name}")()
        return self._have[name]

    def _h_attention(self) -> Tensor:
        return _normed(self._layer.input_norm, self["residual_in"])

    def _qkv(self) -> Tensor:
        return self._forward.linear(self._layer.qkv_proj, self["h_attention"])

    def _q(self) -> Tensor:
        """(W, H, E), as attention sees it."""
        geometry = self._layer.attention
        heads, dim = geometry.num_heads, geometry.head_dim
        q_WHE = self["qkv"][:, : heads * dim].reshape(-1, heads, dim)
        if self._layer.q_norm is not None:
            q_WHE = _normed(self._layer.q_norm, q_WHE)
        return apply_rope(q_WHE, self.cos_sin)

    def _attention(self) -> Tensor:
        geometry, inputs = self._layer.attention, self._inputs
        out_WHE = attention_varlen(
            self["q"],
            inputs.kv,
            inputs.segments,
            scale=geometry.scale,
            sliding_window=geometry.sliding_window,
        )
        return out_WHE.flatten(1)

    def _residual_mid(self) -> Tensor:
        return self["residual_in"] + self._forward.linear(self._layer.o_proj, self["attention"])

    def _h_mlp(self) -> Tensor:
        return _normed(self._layer.post_norm, self["residual_mid"])

    def _gate_up(self) -> Tensor:
        return self._forward.linear(self._layer.gate_up_proj, self["h_mlp"])

    def _act(self) -> Tensor:
        return silu_mul(self["gate_up"])


def _normed(norm: RMSNorm, x: Tensor) -> Tensor:
    return rms_norm(x, norm.weight, norm.eps)
