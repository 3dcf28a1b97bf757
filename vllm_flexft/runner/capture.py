"""Forward hooks that copy finetune rows of the batch into the activation store."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from vllm_flexft.train.activations import ActivationStore
from vllm_flexft.train.model import ServedModel

# From a module's arguments and output: the tensor to keep.
Pick = Callable[[tuple, Any], Tensor]


@dataclass(frozen=True, slots=True)
class CapturedRows:
    """Rows [start, stop) of the batch go to the lane from row `to` on."""

    start: int
    stop: int
    lane: int
    to: int


class Capture:
    """Hooks on the layers that the backward reads; they do nothing while `rows` is empty.

    A failure inside a hook is kept in `error` and never reaches the forward pass, which inference
    requests share.
    """

    def __init__(self, model: ServedModel, store: ActivationStore) -> None:
        self.rows: list[CapturedRows] = []
        self.error: Exception | None = None
        self._store = store
        self._handles: list[Any] = []
        for layer in model.layers:
            self._after(layer.input_norm.module, layer.index, "residual_in", _residual)
            self._after(layer.qkv_proj.module, layer.index, "qkv", _output)
            self._before(layer.o_proj.module, layer.index, "attention")
            self._after(layer.post_norm.module, layer.index, "residual_mid", _residual)
            self._after(layer.gate_up_proj.module, layer.index, "gate_up", _output)
        self._after(model.final_norm.module, len(model.layers), "residual_in", _residual)

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _after(self, module: nn.Module, layer: int, name: str, pick: Pick) -> None:
        if self._store.holds(layer, name):
            self._handles.append(
                module.register_forward_hook(
                    lambda _, args, output: self._copy(layer, name, pick, args, output)
                )
            )

    def _before(self, module: nn.Module, layer: int, name: str) -> None:
        if self._store.holds(layer, name):
            self._handles.append(
                module.register_forward_pre_hook(
                    lambda _, args: self._copy(layer, name, _input, args, None)
                )
            )

    def _copy(self, layer: int, name: str, pick: Pick, args: tuple, output: Any) -> None:
        if not self.rows:
            return
        try:
            source = pick(args, output)
            for rows in self.rows:
                self._store.write(rows.lane, layer, name, rows.to, source[rows.start : rows.stop])
        except Exception as error:
            self.error = self.error or error


def _input(args: tuple, _output: Any) -> Tensor:
    return args[0]


def _output(_args: tuple, output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def _residual(args: tuple, output: Any) -> Tensor:
    """The residual stream at a norm: vLLM's fused add-norm returns it beside the normed value."""
    return output[1] if isinstance(output, tuple) else args[0]
