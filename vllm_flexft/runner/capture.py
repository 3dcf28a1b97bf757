"""Copies finetune rows of the batch, as layers compute them, into the activation store."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from vllm_flexft.runner.capture_op import Pick, listen, place
from vllm_flexft.train.activations import ActivationStore, LaneRows
from vllm_flexft.train.model import ServedModel


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

    def __init__(self, model: ServedModel, store: ActivationStore) -> None:
        self.rows: list[LaneRows] = []
        self.error: Exception | None = None
        self._store = store
        parts = [
            (l.input_norm, l.qkv_proj, l.o_proj, l.post_norm, l.gate_up_proj) for l in model.layers
        ]
        modules = [[part.module for part in layer] for layer in parts]
        self._ends = [
            listen(point.module, point.name, point.pick, self._copier(point), before=point.before)
            for point in _points(modules, model.final_norm.module)
            if store.holds(point.layer, point.name)
        ]

    def remove(self) -> None:
        while self._ends:
            self._ends.pop()()

    def _copier(self, point: _Point) -> Callable[[Tensor], None]:
        return lambda source: self._copy(point, source)

    def _copy(self, point: _Point, source: Tensor) -> None:
        if not self.rows:
            return
        try:
            for rows in self.rows:
                self._store.write(rows, point.layer, point.name, source)
        except Exception as error:
            self.error = self.error or error


def place_ops(model: nn.Module) -> None:
    """Make a model that vLLM is going to compile able to be listened to."""
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
        place(point.module, point.name, point.pick, before=point.before)


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
