"""Which sequences an optimizer step trains on."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt


class BatchOrder:
    """The order of a run: a function of (seed, step) alone, so a resume needs only its step.

    Counts steps as transformers' Trainer does: the last batch of an epoch may be smaller, and a
    run has ceil(num_train_epochs x steps_per_epoch) steps, or max_steps if that is > 0.

    Args:
        num_rows: sequences in the dataset.
        batch_size: sequences an optimizer step.
        shuffle: a new order every epoch; otherwise the dataset's own order.
    """

    def __init__(
        self,
        num_rows: int,
        batch_size: int,
        seed: int,
        shuffle: bool = True,
        num_train_epochs: float = 3.0,
        max_steps: int = -1,
    ) -> None:
        if num_rows < 1 or batch_size < 1:
            raise ValueError(f"num_rows {num_rows} and batch_size {batch_size} must be >= 1")
        self.num_rows = num_rows
        self.batch_size = batch_size
        self.seed = seed
        self.shuffle = shuffle
        self.steps_per_epoch = math.ceil(num_rows / batch_size)
        self.total_steps = (
            max_steps if max_steps > 0 else math.ceil(num_train_epochs * self.steps_per_epoch)
        )
        self._permutations: dict[int, npt.NDArray[np.int64]] = {}  # of the last epochs

    def rows(self, step: int) -> list[int]:
        """Sequences of optimizer step `step`, counted from 0: indices into the dataset.

        O(batch), but for the first step of an epoch that was not drawn before.
        """
        if not 0 <= step < self.total_steps:
            raise IndexError(f"step {step} of {self.total_steps}")
        epoch, batch = divmod(step, self.steps_per_epoch)
        begin = batch * self.batch_size
        end = min(begin + self.batch_size, self.num_rows)
        if not self.shuffle:
            return list(range(begin, end))
        self._draw(epoch)
        result: list[int] = self._permutations[epoch][begin:end].tolist()
        return result

    def epoch(self, step: int) -> float:
        """Epochs done when `step` optimizer steps are done, as Trainer logs them."""
        return step / self.steps_per_epoch

    def draw_after(self, step: int) -> None:
        """Have the order of the epoch after that of `step` ready. From any thread: a million rows
        take a tenth of a second, for which a step must not wait."""
        epoch = step // self.steps_per_epoch + 1
        if epoch * self.steps_per_epoch < self.total_steps:
            self._draw(epoch)

    def _draw(self, epoch: int) -> None:
        if not self.shuffle or epoch in self._permutations:
            return
        # Sorting raw draws, in place of Generator.permutation, whose result may change with
        # NumPy's version (NEP 19): a resume may run under another one.
        draws = np.random.PCG64([self.seed, epoch]).random_raw(self.num_rows)
        self._permutations[epoch] = np.argsort(draws, kind="stable")
        for drawn in list(self._permutations):
            if drawn < epoch - 1:
                self._permutations.pop(drawn, None)
