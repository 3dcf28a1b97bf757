"""What the slices of a micro-batch's backward hold, added up in the order in which they run."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import numpy.typing as npt

from vllm_flexft.graph.grid import BackwardGrid
from vllm_flexft.plan import MicroBatch

Amounts = tuple[float, float, float]  # Feature.LOSS, LAYER, LAYER_CONTEXT


class SliceAmounts:
    """Only of the loss and of one layer: all layers are alike."""

    def __init__(self, grid: BackwardGrid, batch: MicroBatch) -> None:
        self.num_slices = grid.num_slices
        rows = np.zeros(grid.num_tokens)
        rows[:-1] = batch.supervised[1:]  # row t predicts token t + 1
        self._rows = _sums(rows, grid.windows.loss)
        self._tokens = _sums(np.ones(grid.num_tokens), grid.windows.layer)
        keys = np.arange(1.0, grid.num_tokens + 1)  # of a lane of one sequence
        for start, stop in itertools.pairwise(batch.offsets):
            keys[start:stop] -= start
        self._keys = _sums(keys, grid.windows.layer)

    def before(self, slices: int) -> Amounts:
        """Of the first so many slices: rows of the loss, tokens x layers, keys x layers."""
        below = slices - len(self._rows) + 1
        if below <= 0:
            return self._rows[slices], 0.0, 0.0
        layers, windows = divmod(below, len(self._tokens) - 1)
        return (
            self._rows[-1],
            layers * self._tokens[-1] + self._tokens[windows],
            layers * self._keys[-1] + self._keys[windows],
        )


def _sums(amounts: npt.NDArray[np.floating[Any]], window: int) -> list[float]:
    """Of the first n windows for each n; the windows run last to first."""
    borders = np.arange(0, len(amounts), window)
    return [0.0, *itertools.accumulate(np.add.reduceat(amounts, borders)[::-1].tolist())]
