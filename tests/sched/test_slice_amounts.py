from __future__ import annotations

import numpy as np
import pytest

from vllm_flexft.graph.grid import BackwardGrid
from vllm_flexft.plan import MicroBatch, Windows
from vllm_flexft.sched.slice_amounts import SliceAmounts

OFFSETS = (0, 45, 46, 100, 171)
LAYERS = 5


@pytest.mark.parametrize("lowest_layer", [0, 3, LAYERS])
def test_amounts_are_those_of_the_slices_that_the_grid_runs(lowest_layer: int) -> None:
    tokens = OFFSETS[-1]
    grid = BackwardGrid(tokens, Windows(layer=32, loss=20), LAYERS, lowest_layer)
    supervised = np.random.default_rng(0).random(tokens) < 0.7
    batch = MicroBatch(1, 0, np.zeros(tokens, np.int32), supervised, OFFSETS, 1.0, True)
    amounts = SliceAmounts(grid, batch.supervised, batch.offsets)
    rows = layer_tokens = keys = 0
    for index in range(grid.num_slices):
        assert amounts.before(index) == (rows, layer_tokens, keys)
        piece = grid.slice(index)
        span = range(piece.start, piece.stop)
        if piece.stage == LAYERS:
            rows += sum(bool(supervised[t + 1]) for t in span if t + 1 < tokens)
        else:
            layer_tokens += len(span)
            keys += sum(t + 1 - max(o for o in OFFSETS if o <= t) for t in span)
    assert amounts.before(grid.num_slices) == (rows, layer_tokens, keys)
    assert amounts.num_slices == grid.num_slices
