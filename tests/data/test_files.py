"""Rows of every file type, and the line of every mistake."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from vllm_flexft.data.files import DataError, read_rows

ROWS = [{"text": 'é, "x"\n'}, {"text": "b"}]


def write(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def refusal(path: Path) -> str:
    with pytest.raises(DataError) as caught:
        list(read_rows(path))
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.jsonl", "\n".join(json.dumps(row) for row in ROWS)),
        ("bom.jsonl", "\ufeff" + "\n\n".join(json.dumps(row) for row in ROWS) + "\n"),
        ("a.json", "\n " + json.dumps(ROWS, indent=1)),
        ("lines.json", "\n".join(json.dumps(row) for row in ROWS)),
        ("a.csv", 'text\n"é, ""x""\n"\nb\n'),
        ("crlf.CSV", 'text\r\n"é, ""x""\n"\r\nb\r\n'),
    ],
)
def test_rows_are_the_same_in_every_file_type(tmp_path: Path, name: str, text: str) -> None:
    rows = list(read_rows(write(tmp_path / name, text)))
    assert [(row.index, row.values) for row in rows] == list(enumerate(ROWS))


def test_rows_of_a_parquet_file(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow", reason="needs pyarrow")
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    assert [row.values for row in read_rows(tmp_path / "a.parquet")] == ROWS


def test_broken_parquet_file_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow", reason="needs pyarrow")
    assert "not Parquet" in refusal(write(tmp_path / "a.parquet", "PAR1"))


def test_parquet_without_pyarrow_is_refused_with_the_remedy(tmp_path: Path) -> None:
    if importlib.util.find_spec("pyarrow"):
        pytest.skip("pyarrow is installed")
    assert "pip install pyarrow" in refusal(write(tmp_path / "a.parquet", ""))


def test_rows_of_a_datasets_folder(tmp_path: Path) -> None:
    pytest.importorskip("datasets", reason="needs datasets")
    write(tmp_path / "train.jsonl", "\n".join(json.dumps(row) for row in ROWS))
    assert [row.values for row in read_rows(tmp_path)] == ROWS


def test_dataset_id_without_datasets_is_refused_with_the_remedy() -> None:
    if importlib.util.find_spec("datasets"):
        pytest.skip("datasets is installed")
    assert "pip install datasets" in refusal(Path("org/name"))


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("a.jsonl", '{"a": 1}\n\n{"a": \n', "a.jsonl, line 3, column 6: not JSON: Expecting value"),
        ("b.jsonl", '{"a": 1}\n[1]\n', "b.jsonl, line 2: expected an object, got list"),
        ("c.jsonl", b'{"a": "\xff"}\n', "c.jsonl: not UTF-8"),
        ("d.jsonl", "[" * 100_000, "d.jsonl, line 1: not JSON"),
        ("a.json", '[{"a": 1},\n {"a": }]', "a.json, line 2: not JSON"),
        ("b.json", '[{"a": 1}, 2]', "b.json, item 2: expected an object, got int"),
        ("a.csv", "x,y\n1,2\n1\n", "a.csv, line 3: 1 fields where the header has 2"),
        ("b.csv", "x,x\n1,2\n", "b.csv, line 1: a column name is repeated"),
        ("c.csv", 'x\n"a"b\n', "c.csv, line 2: not CSV"),
    ],
)
def test_malformed_file_is_refused_with_its_line(
    tmp_path: Path, name: str, text: str | bytes, expected: str
) -> None:
    assert expected in refusal(write(tmp_path / name, text))


def test_missing_file_is_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path / "a.jsonl") == f"{tmp_path}/a.jsonl: no such file"
