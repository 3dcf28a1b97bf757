"""The dataset in memory: what is kept, cut, dropped and reported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vllm_flexft.config import DatasetConfig
from vllm_flexft.data import DataError, TrainingData


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def texts(tmp_path: Path, base_tokenizer: Any) -> str:
    """Four rows, the first the shortest, then the third, the second and the last."""
    rows = [{"text": "the dog " * count} for count in (1, 5, 3, 9)]
    return write(tmp_path / "texts.jsonl", rows)


def load(path: str, tokenizer: Any, *, max_model_len: int = 4096, **config: Any) -> TrainingData:
    return TrainingData.load(
        DatasetConfig(path=path, **config), tokenizer, max_model_len=max_model_len
    )


def test_sequences_are_the_rows_in_order(tmp_path: Path, base_tokenizer: Any) -> None:
    rows = [{"prompt": f"{i}", "completion": f"and {i}"} for i in range(1100)]
    data = load(write(tmp_path / "a.jsonl", rows), base_tokenizer)
    for i in (0, 511, 512, 1099):
        sequence = data[i]
        assert sequence.row == i
        assert base_tokenizer.decode(sequence.token_ids) == f"<s>{i}and {i}</s>"
        assert base_tokenizer.decode(sequence.token_ids[sequence.supervised]) == f"and {i}</s>"
        assert (sequence.token_ids.dtype, sequence.supervised.dtype) == (np.int32, np.bool_)


def test_iteration_ends_at_the_last_sequence(texts: str, base_tokenizer: Any) -> None:
    assert [sequence.row for sequence in load(texts, base_tokenizer)] == [0, 1, 2, 3]


def test_negative_index_counts_from_the_end(texts: str, base_tokenizer: Any) -> None:
    assert load(texts, base_tokenizer)[-1].row == 3


def test_sequences_cannot_be_written_to(texts: str, base_tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="read-only"):
        load(texts, base_tokenizer)[0].token_ids[0] = 1


def lengths_of(path: str, tokenizer: Any) -> list[int]:
    return [len(sequence.token_ids) for sequence in load(path, tokenizer)]


def test_truncated_sequences_keep_their_beginning_and_are_counted(
    texts: str, base_tokenizer: Any
) -> None:
    full = load(texts, base_tokenizer)
    limit = len(full[2].token_ids)
    cut = load(texts, base_tokenizer, max_length=limit)
    longer = sum(len(sequence.token_ids) > limit for sequence in full)
    assert longer > 0
    assert (cut.report.truncated, cut.report.dropped, len(cut)) == (longer, 0, 4)
    for whole, sequence in zip(full, cut, strict=True):
        assert sequence.token_ids.tolist() == whole.token_ids[:limit].tolist()


def test_dropped_sequences_are_counted_and_rows_keep_their_number(
    texts: str, base_tokenizer: Any
) -> None:
    lengths = lengths_of(texts, base_tokenizer)
    data = load(texts, base_tokenizer, max_length=lengths[2], overlong="drop")
    kept = [row for row, length in enumerate(lengths) if length <= lengths[2]]
    assert [sequence.row for sequence in data] == kept
    assert data.report.dropped_overlong == data.report.dropped == 4 - len(kept) > 0


def test_overlong_error_tells_how_many_and_the_longest(texts: str, base_tokenizer: Any) -> None:
    lengths = lengths_of(texts, base_tokenizer)
    with pytest.raises(DataError) as caught:
        load(texts, base_tokenizer, max_length=lengths[2], overlong="error")
    assert f"2 of 4 rows are longer than max_length {lengths[2]}" in str(caught.value)
    assert f"with {max(lengths)} tokens at {texts}, line 4" in str(caught.value)


def test_rows_without_a_target_are_dropped_and_counted(tmp_path: Path, chat_tokenizer: Any) -> None:
    user, assistant = ({"role": r, "content": "the dog"} for r in ("user", "assistant"))
    path = write(
        tmp_path / "a.jsonl", [{"messages": m} for m in ([user], [user, assistant], [user])]
    )
    report = load(path, chat_tokenizer).report
    assert (report.rows, report.sequences, report.dropped_no_target) == (3, 1, 2)


def test_report_counts_tokens_and_targets(tmp_path: Path, base_tokenizer: Any) -> None:
    rows = [{"prompt": "the", "completion": "dog"}, {"prompt": "", "completion": "fox"}]
    data = load(write(tmp_path / "a.jsonl", rows), base_tokenizer)
    assert data.report.tokens == sum(len(sequence.token_ids) for sequence in data)
    assert data.report.targets == sum(sequence.num_targets for sequence in data)
    assert str(data.report).startswith("2 sequences of 2 rows; ")


def test_default_max_length_is_cut_to_what_the_server_allows(
    texts: str, base_tokenizer: Any
) -> None:
    assert load(texts, base_tokenizer, max_model_len=6).report.max_length == 5
    assert load(texts, base_tokenizer, max_model_len=1025).report.max_length == 1024


def test_max_length_beyond_the_servers_is_refused(texts: str, base_tokenizer: Any) -> None:
    with pytest.raises(DataError, match=r"set max_length to 99 or less, .*--max-model-len 101"):
        load(texts, base_tokenizer, max_length=100, max_model_len=100)


@pytest.mark.parametrize(
    ("row", "config", "remedy"),
    [
        ({"messages": [{"role": "user", "content": "q"}]}, {}, "expected assistant messages"),
        ({"prompt": "the quick brown fox " * 9, "completion": "x"}, {"max_length": 9}, "raise"),
        ({"text": "fox " * 99}, {"max_length": 9, "overlong": "drop"}, "overlong: truncate"),
    ],
)
def test_dataset_without_any_target_is_refused_with_a_remedy(
    tmp_path: Path, chat_tokenizer: Any, row: dict, config: dict, remedy: str
) -> None:
    with pytest.raises(DataError, match=remedy):
        load(write(tmp_path / "a.jsonl", [row] * 3), chat_tokenizer, **config)


@pytest.mark.parametrize("text", ["", "\n\n", " "])
def test_empty_dataset_is_refused(tmp_path: Path, base_tokenizer: Any, text: str) -> None:
    (tmp_path / "a.jsonl").write_text(text)
    with pytest.raises(DataError, match="the dataset is empty"):
        load(str(tmp_path / "a.jsonl"), base_tokenizer)


@pytest.mark.parametrize("tokenizer", ["base_tokenizer", "chat_tokenizer"])
@pytest.mark.parametrize("name", ["gsm8k_train.jsonl", "alpaca_en_demo.json"])
def test_public_dataset_loads_as_it_is(
    data_dir: Path, request: pytest.FixtureRequest, name: str, tokenizer: str
) -> None:
    tok = request.getfixturevalue(tokenizer)
    data = load(str(data_dir / name), tok, max_model_len=8192, max_length=4096)
    assert (data.report.sequences, data.report.truncated) == (data.report.rows, 0)
    text = (data_dir / name).read_text()
    rows = json.loads(text) if name.endswith("json") else list(map(json.loads, text.splitlines()))
    ending = (
        "<|im_end|>" if (name, tokenizer) == ("alpaca_en_demo.json", "chat_tokenizer") else "</s>"
    )
    for sequence, row in zip(data, rows, strict=True):
        answer = row.get("answer", row.get("output"))
        learnt = tok.decode(sequence.token_ids[sequence.supervised])
        assert learnt.endswith(answer + ending)
        assert len(learnt) <= len(answer + ending) + 8  # at most one token over the border
