"""The fixed grid of backward slices: (stage x token window), in the order they run.

Stages are numbered like the residual stream: stage `num_layers` is the loss head, stage `l` is
decoder layer l. They run from the loss down to the lowest layer that holds a trainable adapter;
inside a stage the windows run last to first, so that the dK and dV of a window are complete when
its turn comes (every later query has been through). The scheduler chooses how many slices fit a
step, never where they are cut: the order of summation does not depend on load.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Slice:
    stage: int
    start: int  # tokens [start, stop) of the micro-batch
    stop: int
    first_of_stage: bool
    last_of_stage: bool


@dataclass(frozen=True, slots=True)
class BackwardGrid:
    num_tokens: int
    window: int
    num_layers: int
    lowest_layer: int  # num_layers: stop after the loss (evaluation)

    @property
    def num_windows(self) -> int:
        return -(-self.num_tokens // self.window)

    @property
    def num_slices(self) -> int:
        return self.num_windows * (1 + self.num_layers - self.lowest_layer)

    def slice(self, index: int) -> Slice:
        """The index-th slice to run; 0 is the last window of the loss."""
        assert 0 <= index < self.num_slices, (index, self)
        stage_rank, window_rank = divmod(index, self.num_windows)
        window_index = self.num_windows - 1 - window_rank
        start = window_index * self.window
        return Slice(
            stage=self.num_layers - stage_rank,
            start=start,
            stop=min(start + self.window, self.num_tokens),
            first_of_stage=window_rank == 0,
            last_of_stage=window_index == 0,
        )
