"""The fixed grid of backward slices: (stage x token window), in the order they run.

Stages are numbered like the residual stream: stage `num_layers` is the loss head, stage `l` is
decoder layer l. They run from the loss down to the lowest layer that holds a trainable adapter;
inside a stage the windows run last to first, so that the dK and dV of a window are complete when
its turn comes (every later query has been through). The scheduler chooses how many slices fit a
step, never where they are cut: the order of summation does not depend on load.

A slice cannot be cut, so it must fit what a busy step has left. The LM head is as large as several
layers: its windows are shorter, so that a slice of the loss takes no longer than one of a layer.
"""

from __future__ import annotations

from dataclasses import dataclass

from vllm_flexft.plan import Windows


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
    windows: Windows
    num_layers: int
    lowest_layer: int  # num_layers: stop after the loss (evaluation)

    @property
    def num_loss_slices(self) -> int:
        return -(-self.num_tokens // self.windows.loss)

    @property
    def num_layer_windows(self) -> int:
        """Slices of each layer."""
        return -(-self.num_tokens // self.windows.layer)

    @property
    def num_slices(self) -> int:
        layers = self.num_layers - self.lowest_layer
        return self.num_loss_slices + layers * self.num_layer_windows

    def slice(self, index: int) -> Slice:
        """The index-th slice to run; 0 is the last window of the loss."""
        assert 0 <= index < self.num_slices, (index, self)
        below = index - self.num_loss_slices
        if below < 0:
            stage, window_rank = self.num_layers, index
            count, window = self.num_loss_slices, self.windows.loss
        else:
            count, window = self.num_layer_windows, self.windows.layer
            stage_rank, window_rank = divmod(below, count)
            stage = self.num_layers - 1 - stage_rank
        window_index = count - 1 - window_rank
        start = window_index * window
        return Slice(
            stage=stage,
            start=start,
            stop=min(start + window, self.num_tokens),
            first_of_stage=window_rank == 0,
            last_of_stage=window_index == 0,
        )
