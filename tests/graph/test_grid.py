"""The backward grid: every token of every stage once, and keys complete when they are needed."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from vllm_flexft.graph.grid import BackwardGrid
from vllm_flexft.plan import Windows


@st.composite
def grids(draw: st.DrawFn) -> BackwardGrid:
    num_layers = draw(st.integers(1, 5))
    return BackwardGrid(
        num_tokens=draw(st.integers(1, 700)),
        windows=Windows(
            layer=draw(st.sampled_from((1, 2, 7, 32, 61, 256, 1000))),
            loss=draw(st.sampled_from((1, 3, 32, 100))),
        ),
        num_layers=num_layers,
        lowest_layer=draw(st.integers(0, num_layers)),
    )


def window_of(grid: BackwardGrid, stage: int) -> int:
    return grid.windows.loss if stage == grid.num_layers else grid.windows.layer


FAST = settings(derandomize=True, deadline=None, database=None, max_examples=60)


@FAST
@given(grids())
def test_slices_cover_every_stage_and_token_exactly_once(grid):
    covered = [
        (part.stage, token)
        for part in map(grid.slice, range(grid.num_slices))
        for token in range(part.start, part.stop)
    ]
    stages = range(grid.lowest_layer, grid.num_layers + 1)
    assert len(covered) == len(set(covered))
    assert set(covered) == {(s, t) for s in stages for t in range(grid.num_tokens)}


@FAST
@given(grids())
def test_slices_run_from_the_loss_down_and_from_the_last_token_back(grid):
    parts = [grid.slice(i) for i in range(grid.num_slices)]
    assert parts == sorted(parts, key=lambda part: (-part.stage, -part.start))
    assert parts[0].stage == grid.num_layers


@FAST
@given(grids())
def test_no_slice_is_longer_than_its_window_or_empty(grid):
    for part in map(grid.slice, range(grid.num_slices)):
        assert 1 <= part.stop - part.start <= window_of(grid, part.stage)


@FAST
@given(grids())
def test_window_borders_are_multiples_of_the_window_in_every_stage(grid):
    parts = [grid.slice(i) for i in range(grid.num_slices)]
    for stage in {part.stage for part in parts}:
        starts = {part.start for part in parts if part.stage == stage}
        assert starts == set(range(0, grid.num_tokens, window_of(grid, stage)))


@FAST
@given(grids())
def test_first_and_last_slice_of_each_stage_are_marked_and_no_others(grid):
    parts = [grid.slice(i) for i in range(grid.num_slices)]
    for stage in {part.stage for part in parts}:
        of_stage = [part for part in parts if part.stage == stage]
        assert [part.first_of_stage for part in of_stage] == [True] + [False] * (len(of_stage) - 1)
        assert [part.last_of_stage for part in of_stage] == [False] * (len(of_stage) - 1) + [True]


def test_evaluation_has_the_loss_stage_only():
    grid = BackwardGrid(num_tokens=100, windows=Windows(32, 20), num_layers=4, lowest_layer=4)
    assert {grid.slice(i).stage for i in range(grid.num_slices)} == {4}


@pytest.mark.parametrize("index", [-1, 9])
def test_slice_outside_the_grid_is_an_error(index):
    grid = BackwardGrid(num_tokens=100, windows=Windows(32, 20), num_layers=1, lowest_layer=0)
    assert grid.num_slices == 9
    with pytest.raises(AssertionError):
        grid.slice(index)
