"""Copies finetune rows of the batch, as layers compute them, into the activation store."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from vllm_flexft.runner.capture_op import Pick, Sites
from vllm_flexft.train.activations import ActivationStore, LaneRows


@dataclass(frozen=True, slots=True)
class _Point:
    """Where a tensor of a layer (graph/families.py) passes by in vLLM's modules."""

    layer: int
    name: str
    module: Any
    pick: Pick
    before: bool = False


class Capture:
    """Listens to the layers that the backward reads; does nothing while `rows` is empty.

    A failure in here is kept in `error` and never reaches the forward pass, which inference
    requests share.
    """

    def __init__(self, sites: Sites, store: ActivationStore) -> None:
        """`sites`: of the served model, from `place_ops`."""
        self.rows: list[LaneRows] = []
        self.error: Exception | None = None
        self._store = store
        self._ends = [
            sites.listen((layer, name), self._copier(layer, name))
            for layer, name in sites.keys
            if store.holds(layer, name)
        ]

    def remove(self) -> None:
        while self._ends:
            self._ends.pop()()

    def _copier(self, layer: int, name: str) -> Callable[[Tensor], None]:
        return lambda source: self._copy(layer, name, source)

    def _copy(self, layer: int, name: str, source: Tensor) -> None:
        if not self.rows:
            return
        try:
            for rows in self.rows:
                self._store.write(rows, layer, name, source)
        except Exception as error:
            self.error = self.error or error


def place_ops(model: nn.Module) -> Sites:
    """Make a model, which vLLM may be going to compile, able to be listened to: at the tensors of
    graph/families.py, by (layer, name)."""
    sites = Sites()
    inner: Any = model.model
    modules = [
        [
            layer.input_layernorm,
            layer.self_attn.qkv_proj,
            layer.self_attn.o_proj,
            layer.post_attention_layernorm,
            layer.mlp.gate_up_proj,
        ]
        for layer in inner.layers
    ]
    for point in _points(modules, inner.norm):
        sites.place((point.layer, point.name), point.module, point.pick, before=point.before)
    return sites


def _points(layers: list[list[Any]], final_norm: Any) -> Iterator[_Point]:
    """layers: of each the input norm, qkv, output projection, norm before the MLP, gate and up."""
    for index, (input_norm, qkv_proj, o_proj, post_norm, gate_up_proj) in enumerate(layers):
        yield _Point(index, "residual_in", input_norm, _residual)
        yield _Point(index, "qkv", qkv_proj, _output)
        yield _Point(index, "attention", o_proj, _input, before=True)
        yield _Point(index, "residual_mid", post_norm, _residual)
        yield _Point(index, "gate_up", gate_up_proj, _output)
    yield _Point(len(layers), "residual_in", final_norm, _residual)


def _input(args: tuple, _output: Any) -> Tensor:
    return args[0]


def _output(_args: tuple, output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def _residual(args: tuple, output: Any) -> Tensor:
    """The residual stream at a norm: vLLM's fused add-norm returns it beside the normed value."""
    return output[1] if isinstance(output, tuple) else args[0]
