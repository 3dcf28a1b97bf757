"""A data set without a file."""

from __future__ import annotations

import numpy as np

from vllm_flexft.data.dataset import DataReport, TrainingData


def training_data(lengths: list[int]) -> TrainingData:
    """Token t of sequence i is 1000 i + t; the second half of each sequence is supervised."""
    ids = [np.arange(1000 * i, 1000 * i + n, dtype=np.int32) for i, n in enumerate(lengths)]
    masks = [np.arange(n) >= max(1, n // 2) for n in lengths]
    report = DataReport(
        rows=len(lengths), sequences=len(lengths), truncated=0, dropped_overlong=0,
        dropped_no_target=0, tokens=sum(lengths), targets=int(sum(m.sum() for m in masks)),
        max_length=max(lengths),
    )  # fmt: skip
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    return TrainingData(
        np.concatenate(ids), np.concatenate(masks), offsets, np.arange(len(lengths)), report
    )
