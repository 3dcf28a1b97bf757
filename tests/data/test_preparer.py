"""The process that tokenises: the same data and the same errors as without it, and no orphans."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from vllm_flexft.config import DatasetConfig
from vllm_flexft.config.dataset import ValidationConfig
from vllm_flexft.data import DataError, TrainingData
from vllm_flexft.data.preparer import DatasetPreparer, TokenizerSource


@pytest.fixture(scope="module")
def tokenizer_folder(chat_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tokenizer")
    chat_tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def preparer(tokenizer_folder: str) -> Iterator[DatasetPreparer]:
    preparer = DatasetPreparer(TokenizerSource(tokenizer_folder))
    yield preparer
    preparer.close()


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def conversation(number: int) -> dict[str, Any]:
    return {
        "messages": [
            {"role": "user", "content": f"count to {number} in one line"},
            {"role": "assistant", "content": " and ".join(map(str, range(number % 60)))},
        ]
    }


@pytest.mark.parametrize(
    "config",
    [
        DatasetConfig(path="rows", max_length=50),
        DatasetConfig(path="rows", completion_only_loss=False, overlong="drop", max_length=50),
        ValidationConfig(path="rows", every_steps=3),
    ],
)
def test_data_is_what_this_process_would_have_made(
    config: DatasetConfig, preparer: DatasetPreparer, chat_tokenizer: Any, tmp_path: Path
) -> None:
    path = write(tmp_path / "rows.jsonl", [conversation(i) for i in range(600)])
    config = config.model_copy(update={"path": path})
    here = TrainingData.load(config, chat_tokenizer, max_model_len=400)
    there = preparer.load(config, max_model_len=400)
    assert there.report == here.report
    for ours, theirs in zip(there.arrays, here.arrays, strict=True):
        np.testing.assert_array_equal(ours, theirs, strict=True)
    assert not there[0].token_ids.flags.writeable


def test_error_is_the_one_that_this_process_would_have_raised(
    preparer: DatasetPreparer, chat_tokenizer: Any, tmp_path: Path
) -> None:
    path = write(tmp_path / "rows.jsonl", [conversation(3), {"messages": "none"}])
    for config in (DatasetConfig(path=path), DatasetConfig(path=str(tmp_path / "no.jsonl"))):
        with pytest.raises(DataError) as here:
            TrainingData.load(config, chat_tokenizer, max_model_len=400)
        with pytest.raises(DataError) as there:
            preparer.load(config, max_model_len=400)
        assert str(there.value) == str(here.value)


def test_tokenizer_that_cannot_be_loaded_is_named(tmp_path: Path) -> None:
    preparer = DatasetPreparer(TokenizerSource(str(tmp_path / "nowhere")))
    path = write(tmp_path / "rows.jsonl", [conversation(3)])
    with pytest.raises(DataError, match="nowhere"):
        preparer.load(DatasetConfig(path=path), max_model_len=400)
    preparer.close()


def test_child_is_kept_for_the_next_dataset_and_leaves_the_cpu_to_others(
    preparer: DatasetPreparer, tmp_path: Path
) -> None:
    config = DatasetConfig(path=write(tmp_path / "rows.jsonl", [conversation(3)]))
    preparer.load(config, max_model_len=400)
    child = preparer.pid
    assert child is not None
    assert psutil.Process(child).nice() == 19
    preparer.close_if_unused(3600.0)
    preparer.load(config, max_model_len=400)
    assert preparer.pid == child
    preparer.close_if_unused(0.0)
    assert preparer.pid is None
    assert not psutil.pid_exists(child)


def test_killed_child_fails_this_dataset_and_is_replaced_for_the_next(
    preparer: DatasetPreparer, tmp_path: Path
) -> None:
    many = DatasetConfig(path=write(tmp_path / "many.jsonl", [conversation(9)] * 30_000))
    few = DatasetConfig(path=write(tmp_path / "few.jsonl", [conversation(9)]))
    preparer.load(few, max_model_len=400)

    def kill() -> None:
        assert preparer.pid is not None
        os.kill(preparer.pid, signal.SIGKILL)

    with pytest.raises(DataError, match=r"many.jsonl: .* was killed by signal 9"):
        preparer.load(many, max_model_len=400, check=kill)
    assert len(preparer.load(few, max_model_len=400)) == 1


def test_what_check_raises_ends_the_child_at_once(
    preparer: DatasetPreparer, tmp_path: Path
) -> None:
    many = DatasetConfig(path=write(tmp_path / "many.jsonl", [conversation(9)] * 30_000))
    children: list[int | None] = []

    def cancel() -> None:
        children.append(preparer.pid)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        preparer.load(many, max_model_len=400, check=cancel)
    assert children[0] is not None
    assert not psutil.pid_exists(children[0])


PARENT = """
import sys
from vllm_flexft.config import DatasetConfig
from vllm_flexft.data.preparer import DatasetPreparer, TokenizerSource

preparer = DatasetPreparer(TokenizerSource(sys.argv[1]))
check = lambda: print(preparer.pid, flush=True)
preparer.load(DatasetConfig(path=sys.argv[2]), max_model_len=400, check=check)
"""


def test_child_dies_with_a_killed_parent_in_the_middle_of_its_work(
    tokenizer_folder: str, tmp_path: Path
) -> None:
    path = write(tmp_path / "rows.jsonl", [conversation(9)] * 200_000)
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, tokenizer_folder, path], stdout=subprocess.PIPE
    )
    assert parent.stdout is not None
    child = psutil.Process(int(parent.stdout.readline()))
    deadline = time.monotonic() + 120
    while child.nice() != 19:  # it has seen to its end before it begins
        assert time.monotonic() < deadline
        time.sleep(0.05)
    parent.kill()
    parent.wait()
    child.wait(timeout=60)
    parent.stdout.close()
