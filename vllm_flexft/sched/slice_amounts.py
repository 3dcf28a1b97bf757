"""What the slices of a micro-batch's backward hold, added up in the order in which they run."""

from __future__ import annotations

import itertools

import numpy as np
import numpy.typing as npt

from vllm_flexft.graph.grid import BackwardGrid

Amounts = tuple[int, int, int]  # Feature.LOSS, LAYER, LAYER_CONTEXT


class SliceAmounts:
    """Only of the loss and of one layer: all layers are alike."""

    def __init__(
        self, grid: BackwardGrid, supervised: npt.NDArray[np.bool_], offsets: tuple[int, ...]
    ) -> None:
        """`supervised`, `offsets`: of the micro-batch, see plan.MicroBatch."""
        self.num_slices = grid.num_slices
        tokens, windows = grid.num_tokens, grid.windows
        targets = supervised[1:]  # row t predicts token t + 1
        self._rows = _sums(
            [int(np.count_nonzero(targets[a:b])) for a, b in _borders(tokens, windows.loss)]
        )
        layer = _borders(tokens, windows.layer)
        self._tokens = _sums([b - a for a, b in layer])
        self._keys = _sums([_keys(offsets, b) - _keys(offsets, a) for a, b in layer])

    def before(self, slices: int) -> Amounts:
        """Of the first so many slices: rows of the loss, tokens x layers, keys x layers."""
        below = slices - len(self._rows) + 1
        if below <= 0:
            return self._rows[slices], 0, 0
        layers, windows = divmod(below, len(self._tokens) - 1)
        return (
            self._rows[-1],
            layers * self._tokens[-1] + self._tokens[windows],
            layers * self._keys[-1] + self._keys[windows],
        )


def _borders(tokens: int, window: int) -> list[tuple[int, int]]:
    """The windows run last to first."""
    return [(a, min(a + window, tokens)) for a in range(0, tokens, window)][::-1]


def _keys(offsets: tuple[int, ...], tokens: int) -> int:
    """That the first `tokens` of the micro-batch attend: n (n + 1) / 2 in n of a sequence."""
    ends = (min(b, tokens) - a for a, b in itertools.pairwise(offsets) if a < tokens)
    return sum(n * (n + 1) // 2 for n in ends)


def _sums(amounts: list[int]) -> list[int]:
    return [0, *itertools.accumulate(amounts)]
