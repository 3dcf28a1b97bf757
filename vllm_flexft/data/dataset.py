"""A dataset in memory: every sequence's tokens in one array."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vllm_flexft.config import DEFAULT_MAX_LENGTH, DatasetConfig
from vllm_flexft.data.files import (
    SUFFIXES,
    DataError,
    SourceRow,
    datasets_package,
    read_rows,
)
from vllm_flexft.data.formats import normaliser
from vllm_flexft.data.tokenize import ExampleTokenizer, Mask, TokenIds

# Rows a call of the tokenizer: enough to keep its threads busy, a few MB of Python offsets.
_BATCH_ROWS = 512
_FIRST_ROWS = 64  # some tens of milliseconds


@dataclass(frozen=True, slots=True)
class TrainingSequence:
    """One sequence to train on; S tokens.

    Attributes:
        row: the dataset row it came from, counted from 0.
        token_ids: (S,) int32.
        supervised: (S,) bool. True where the token is a target, which makes the prediction at the
            position before it a term of the loss; [0] is always False.
    """

    row: int
    token_ids: TokenIds
    supervised: Mask

    @property
    def num_targets(self) -> int:
        return int(np.count_nonzero(self.supervised))


@dataclass(frozen=True, slots=True)
class DataReport:
    """What became of a dataset's rows: `rows == sequences + dropped`."""

    rows: int
    sequences: int
    truncated: int  # sequences that were cut to max_length
    dropped_overlong: int  # overlong: drop
    dropped_no_target: int  # no token is a target, by the mask or by truncation
    tokens: int
    targets: int
    max_length: int  # in force: the dataset's, or what the server's max_model_len leaves of it

    @property
    def dropped(self) -> int:
        return self.dropped_overlong + self.dropped_no_target

    def __str__(self) -> str:
        parts = [
            f"{self.sequences} sequences of {self.rows} rows",
            f"{self.tokens} tokens, {self.targets} of them targets",
            f"{self.truncated} truncated to {self.max_length}" * (self.truncated > 0),
            f"{self.dropped_overlong} dropped, longer than {self.max_length}"
            * (self.dropped_overlong > 0),
            f"{self.dropped_no_target} dropped without a target" * (self.dropped_no_target > 0),
        ]
        return "; ".join(part for part in parts if part)


class TrainingData:
    """The tokenised dataset: a sequence of `TrainingSequence`, without the dropped rows.

    Five bytes a token and sixteen a row: a million rows of 200 tokens take about 1 GB.
    """

    def __init__(
        self, token_ids: TokenIds, supervised: Mask, offsets: Any, rows: Any, report: DataReport
    ) -> None:
        """Use `load`, or `data.preparer.DatasetPreparer`, which calls it in another process.

        Args:
            token_ids, supervised: all sequences, one after the other.
            offsets: (N + 1,) int64, where each begins and the last ends.
            rows: (N,) int64, the dataset row of each.
        """
        self._token_ids, self._supervised = token_ids, supervised
        self._offsets, self._rows = offsets, rows
        self.report = report
        for array in self.arrays:
            array.flags.writeable = False  # __getitem__ hands out views

    @property
    def arrays(self) -> tuple[TokenIds, Mask, Any, Any]:
        """token_ids, supervised, offsets, rows, as `__init__` takes them."""
        return self._token_ids, self._supervised, self._offsets, self._rows

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return int(np.diff(self._offsets).max())

    @classmethod
    def load(cls, config: DatasetConfig, tokenizer: Any, *, max_model_len: int) -> TrainingData:
        """Read, normalise and tokenise a dataset.

        Args:
            tokenizer: the served model's, a fast transformers tokenizer.
            max_model_len: the server's. A sequence takes one position less, since its prefill is
                scheduled as one that is still to be continued.

        Raises:
            DataError: the file, a row or the whole set cannot be trained on.
        """
        return _read(config, tokenizer, max_model_len).finish()

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> TrainingSequence:
        """Sequence `index`; its arrays are read-only views."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"sequence {index} of {len(self)}")
        index %= len(self)
        tokens = slice(self._offsets[index], self._offsets[index + 1])
        return TrainingSequence(
            int(self._rows[index]), self._token_ids[tokens], self._supervised[tokens]
        )


def check_first_rows(config: DatasetConfig, tokenizer: Any, *, max_model_len: int) -> None:
    """What `TrainingData.load` refuses at once, from the first 64 rows.

    Of a Hugging Face dataset id only that the package is there: its rows may have to be fetched.
    Raises DataError.
    """
    if Path(config.path).suffix.lower() not in SUFFIXES:
        _max_length(config, max_model_len)
        datasets_package(config.path)
        return
    builder = _read(config, tokenizer, max_model_len, first_rows=_FIRST_ROWS)
    if builder.rows < _FIRST_ROWS:  # they are all
        builder.finish()


def _read(
    config: DatasetConfig, tokenizer: Any, max_model_len: int, first_rows: int | None = None
) -> _Builder:
    max_length = _max_length(config, max_model_len)
    tokenise = ExampleTokenizer(tokenizer, completion_only_loss=config.completion_only_loss)
    rows = read_rows(config.path)
    first = next(rows, None)
    if first is None:
        raise DataError(f"{config.path}: the dataset is empty")
    normalise = normaliser(config, first, has_chat_template=bool(tokenizer.chat_template))
    builder = _Builder(config, max_length)
    for batch in _batches(itertools.islice(itertools.chain([first], rows), first_rows)):
        encoded = tokenise([normalise(row) for row in batch], [row.where for row in batch])
        builder.add(batch, encoded)
    return builder


class _Builder:
    """Collects sequences and counts what is cut and dropped."""

    def __init__(self, config: DatasetConfig, max_length: int) -> None:
        self.config, self.max_length = config, max_length
        self.token_ids: list[TokenIds] = []  # one array a batch
        self.supervised: list[Mask] = []
        self.lengths: list[int] = []
        self.kept_rows: list[int] = []
        self.rows = self.truncated = self.dropped_overlong = self.dropped_no_target = 0
        self.overlong_rows = 0
        self.longest = (0, "")  # tokens, where

    def add(self, rows: list[SourceRow], encoded: list[tuple[TokenIds, Mask]]) -> None:
        kept: list[tuple[TokenIds, Mask]] = []
        for row, (token_ids, supervised) in zip(rows, encoded, strict=True):
            self.rows += 1
            overlong = len(token_ids) > self.max_length
            if overlong:
                self.overlong_rows += 1
                self.longest = max(self.longest, (len(token_ids), row.where), key=lambda x: x[0])
                if self.config.overlong == "drop":
                    self.dropped_overlong += 1
                    continue
                token_ids = token_ids[: self.max_length]
                supervised = supervised[: self.max_length]
            if not supervised.any():
                self.dropped_no_target += 1
                continue
            self.truncated += overlong
            self.kept_rows.append(row.index)
            self.lengths.append(len(token_ids))
            kept.append((token_ids, supervised))
        if kept:
            self.token_ids.append(np.concatenate([token_ids for token_ids, _ in kept]))
            self.supervised.append(np.concatenate([supervised for _, supervised in kept]))

    def finish(self) -> TrainingData:
        path = self.config.path
        if self.overlong_rows and self.config.overlong == "error":
            raise DataError(
                f"{path}: {self.overlong_rows} of {self.rows} rows are longer than max_length "
                f"{self.max_length}, the longest with {self.longest[0]} tokens at "
                f"{self.longest[1]}; raise max_length, or set overlong to truncate or drop"
            )
        if not self.kept_rows:
            raise DataError(f"{path}: {self._why_nothing_is_left()}")
        supervised = np.concatenate(self.supervised)
        report = DataReport(
            rows=self.rows,
            sequences=len(self.kept_rows),
            truncated=self.truncated,
            dropped_overlong=self.dropped_overlong,
            dropped_no_target=self.dropped_no_target,
            tokens=len(supervised),
            targets=int(np.count_nonzero(supervised)),
            max_length=self.max_length,
        )
        offsets = np.concatenate(([0], np.cumsum(self.lengths, dtype=np.int64)))
        rows = np.asarray(self.kept_rows, dtype=np.int64)
        return TrainingData(np.concatenate(self.token_ids), supervised, offsets, rows, report)

    def _why_nothing_is_left(self) -> str:
        if self.dropped_overlong:
            return (
                f"{self.dropped_overlong} of {self.rows} rows are longer than max_length "
                f"{self.max_length} and dropped, and no other has a target; raise max_length, "
                "or set overlong: truncate"
            )
        if self.overlong_rows:
            remedy = (
                f"truncation to max_length {self.max_length} cuts the targets off; raise max_length"
            )
        elif self.config.completion_only_loss:
            remedy = (
                "expected assistant messages that are not of weight 0, or completions; "
                "or set completion_only_loss: false"
            )
        else:
            remedy = "expected at least two tokens a row"
        return f"every label is masked in all {self.rows} rows; {remedy}"


def _max_length(config: DatasetConfig, max_model_len: int) -> int:
    room = max_model_len - 1
    if config.max_length <= room:
        return config.max_length
    # By value, not by whether the key was written: job.yaml has every default filled in.
    if config.max_length == DEFAULT_MAX_LENGTH:
        return room
    raise DataError(
        f"max_length {config.max_length} is more than the server's max_model_len {max_model_len} "
        f"leaves, {room}; set max_length to {room} or less, or serve with "
        f"--max-model-len {config.max_length + 1}"
    )


def _batches(rows: Iterable[SourceRow]) -> Iterator[list[SourceRow]]:
    iterator = iter(rows)
    while batch := list(itertools.islice(iterator, _BATCH_ROWS)):
        yield batch
