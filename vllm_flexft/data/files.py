"""Rows of a dataset file, each with the place it came from."""

from __future__ import annotations

import csv
import itertools
import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")


class DataError(ValueError):
    """A dataset that cannot be trained on: says the file, the line and what was expected."""


@dataclass(frozen=True, slots=True)
class SourceRow:
    """One row as the file has it."""

    index: int  # counted from 0
    where: str  # for messages: "train.jsonl, line 3"
    values: dict[str, Any]


def read_rows(path: str | Path) -> Iterator[SourceRow]:
    """Yield the rows of a dataset.

    `.jsonl` and `.csv` are read as a stream. A `.json` file holds a list of objects, or, as many
    do, one object a line. A path without one of these suffixes is given to Hugging Face `datasets`
    (an optional dependency): the `train` split of that id or folder.

    Raises:
        DataError: missing, unreadable or malformed, with the line.
    """
    file = Path(path)
    suffix = file.suffix.lower()
    try:
        if suffix in SUFFIXES and not file.is_file():
            raise DataError(f"{path}: no such file")
        if suffix == ".jsonl":
            yield from _json_lines(file)
        elif suffix == ".json":
            yield from _json(file)
        elif suffix == ".csv":
            yield from _csv(file)
        elif suffix == ".parquet":
            yield from _parquet(file)
        else:
            yield from _hugging_face(str(path))
    except UnicodeDecodeError as exc:
        raise DataError(f"{path}: not UTF-8 ({exc.reason} at byte {exc.start})") from None
    except OSError as exc:
        raise DataError(f"{path}: cannot be read: {exc.strerror or exc}") from None


def _json_lines(file: Path) -> Iterator[SourceRow]:
    index = 0
    with file.open(encoding="utf-8-sig") as stream:
        for number, line in enumerate(stream, 1):
            if not line.strip():
                continue
            where = f"{file}, line {number}"
            try:
                value = json.loads(line)
            except json.JSONDecodeError as exc:
                column = min(exc.pos, len(line.rstrip())) + 1  # not in the next line
                raise DataError(f"{where}, column {column}: not JSON: {exc.msg}") from None
            except RecursionError as exc:
                raise DataError(f"{where}: not JSON: {exc}") from None
            yield SourceRow(index, where, _object(value, where))
            index += 1


def _json(file: Path) -> Iterator[SourceRow]:
    with file.open(encoding="utf-8-sig") as stream:
        while (first := stream.read(1)).isspace():
            pass
    if first != "[":
        yield from _json_lines(file)
        return
    try:
        values = json.loads(file.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as exc:
        raise DataError(f"{file}, line {exc.lineno}: not JSON: {exc.msg}") from None
    except RecursionError as exc:
        raise DataError(f"{file}: not JSON: {exc}") from None
    for index, value in enumerate(values):
        where = f"{file}, item {index + 1}"
        yield SourceRow(index, where, _object(value, where))


def _csv(file: Path) -> Iterator[SourceRow]:
    csv.field_size_limit(sys.maxsize)  # the default of 128 KiB is less than a long conversation
    with file.open(encoding="utf-8-sig", newline="") as stream:
        reader = csv.reader(stream, strict=True)
        try:
            header = next(reader, None)
            if header is None:
                return
            if len(set(header)) != len(header):
                raise DataError(f"{file}, line 1: a column name is repeated: {', '.join(header)}")
            index = 0
            for fields in reader:
                where = f"{file}, line {reader.line_num}"
                if not fields:
                    continue
                if len(fields) != len(header):
                    raise DataError(
                        f"{where}: {len(fields)} fields where the header has {len(header)}"
                    )
                yield SourceRow(index, where, dict(zip(header, fields, strict=True)))
                index += 1
        except csv.Error as exc:
            raise DataError(f"{file}, line {reader.line_num}: not CSV: {exc}") from None


def _parquet(file: Path) -> Iterator[SourceRow]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise DataError(f"{file}: reading .parquet needs pyarrow: pip install pyarrow") from None
    try:
        batches = pq.ParquetFile(file).iter_batches()
        yield from _numbered(
            file, itertools.chain.from_iterable(batch.to_pylist() for batch in batches)
        )
    except pa.ArrowException as exc:
        raise DataError(f"{file}: not Parquet: {exc}") from None


def datasets_package(path: str) -> Any:
    """Raises DataError where Hugging Face `datasets`, which `path` needs, is not installed."""
    try:
        import datasets
    except ImportError:
        raise DataError(
            f"{path}: no {', '.join(SUFFIXES)} file; a Hugging Face datasets id needs "
            "pip install datasets"
        ) from None
    return datasets


def _hugging_face(path: str) -> Iterator[SourceRow]:
    datasets = datasets_package(path)
    try:
        rows = datasets.load_dataset(path, split="train")
    except Exception as exc:
        # A loader's errors are of many types, the hub client's and the parsers' among them.
        raise DataError(f"{path}: datasets.load_dataset: {exc}") from exc
    yield from _numbered(path, rows)


def _numbered(source: object, values: Iterable[Any]) -> Iterator[SourceRow]:
    for index, value in enumerate(values):
        yield SourceRow(index, f"{source}, row {index + 1}", value)


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(f"{where}: expected an object, got {type(value).__name__}")
    return value
