"""The last steps, one record each: what they held, how long they were thought to take, and took.

A ring of preallocated records: adding one takes about a microsecond. Times are in seconds.
"""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

CAPACITY = 65536  # steps: 20 minutes at 20 ms; 6 MB

RECORD = np.dtype(
    [
        ("step", np.int64),  # counted from the engine's start
        ("time", np.float64),  # when it was scheduled, on the clock of the caller
        ("decode_rows", np.int32),
        ("prefill_tokens", np.int32),
        ("context", np.int64),  # keys that inference attended
        ("waiting", np.int32),  # requests that could run but had no place
        ("finetune_tokens", np.int32),  # through the forward
        ("loss_rows", np.int32),  # of backward slices of the loss
        ("layer_tokens", np.int32),  # of backward slices of layers: tokens x layers
        ("updates", np.int8),
        ("saves", np.int8),
        ("budget", np.float32),  # that finetuning was allowed
        ("spent", np.float32),  # of it, by the upper bound
        ("limit", np.float32),  # of the whole step
        ("predicted", np.float32),  # of the whole step
        ("bound", np.float32),  # of the whole step, upper
        ("actual", np.float32),  # NaN while the step runs, and where it was not measured
        ("finetune_blocks", np.int32),  # KV-cache blocks that finetuning holds
        ("free_blocks", np.int32),
    ]
)


class StepTrace:
    def __init__(self, capacity: int = CAPACITY) -> None:
        self._records = np.zeros(capacity, dtype=RECORD)
        self._actual = self._records["actual"]
        self._count = 0

    def __len__(self) -> int:
        return min(self._count, len(self._records))

    def add(self, *values: Any) -> int:
        """A step that was scheduled: the fields of RECORD from `time` on, but `actual`, in their
        order. Returns its number, for `finished`."""
        step = self._count
        before, after = values[:-2], values[-2:]
        self._records[step % len(self._records)] = (step, *before, math.nan, *after)
        self._count = step + 1
        return step

    def finished(self, step: int, seconds: float) -> None:
        if step >= self._count - len(self._records):
            self._actual[step % len(self._records)] = seconds

    def records(self) -> npt.NDArray[np.void]:
        """A copy, oldest first."""
        at = self._count % len(self._records)
        if self._count <= len(self._records):
            return self._records[: self._count].copy()
        return np.concatenate([self._records[at:], self._records[:at]])

    def dump(self, path: Path) -> None:
        """Write the records: CSV where the name ends in .csv, else a JSON object a line (an unknown
        time is null). Raises OSError."""
        records, names = self.records(), RECORD.names
        assert names is not None
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", newline="") as file:
            if path.suffix == ".csv":
                writer = csv.writer(file)
                writer.writerow(names)
                writer.writerows(records.tolist())
                return
            for values in records.tolist():
                row = zip(names, values, strict=True)
                line = {k: None if v != v else _short(v) for k, v in row}
                file.write(json.dumps(line) + "\n")


def _short(value: float) -> float:
    """float32 has seven digits."""
    return round(value, 9) if isinstance(value, float) else value
