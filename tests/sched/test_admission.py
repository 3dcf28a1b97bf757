from __future__ import annotations

import dataclasses
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from vllm_flexft.cli.sizing import plan_job
from vllm_flexft.config import FinetuneJob
from vllm_flexft.sched.admission import Admission, EngineLimits


@pytest.fixture
def admission(model_config: Any, engine_limits: EngineLimits) -> Admission:
    return Admission(model_config, engine_limits, frozenset({"served"}))


def write(path: Path, rows: list[tuple[str, str]]) -> str:
    path.write_text("".join(json.dumps({"prompt": p, "completion": c}) + "\n" for p, c in rows))
    return str(path)


def job(tmp_path: Path, **sections: Any) -> FinetuneJob:
    rows = write(tmp_path / "rows.jsonl", [("one two", " three"), ("four", " five six")])
    mapping = {"name": "job", "dataset": {"path": rows}, **sections}
    return FinetuneJob.from_mapping(mapping)


def test_a_job_is_prepared_with_its_data_order_and_lowest_layer(
    admission: Admission, tmp_path: Path
) -> None:
    wanted = job(
        tmp_path,
        peft={"layers_to_transform": [2, 3]},
        training={"train_batch_size": 2, "num_train_epochs": 5},
    )
    prepared = admission.prepare("id", wanted, tmp_path / "out")
    assert len(prepared.train) == 2
    assert prepared.order.total_steps == 5
    assert prepared.lowest_layer == 2
    assert prepared.resume_from is None
    assert FinetuneJob.from_yaml(tmp_path / "out" / "job.yaml") == wanted


def test_longest_counts_validation_too(admission: Admission, tmp_path: Path) -> None:
    valid = write(tmp_path / "valid.jsonl", [("word " * 60, " end")])
    prepared = admission.prepare("id", job(tmp_path, validation={"path": valid}), tmp_path / "out")
    assert prepared.longest > 60


def test_a_sequence_beyond_what_the_cache_can_lend_is_refused(
    admission: Admission, tmp_path: Path
) -> None:
    rows = write(tmp_path / "long.jsonl", [("word " * 450, " end")])
    with pytest.raises(
        ValueError, match=r"dataset.max_length: .* (4\d\d|511) tokens .* 384 tokens; set it to 384"
    ):
        admission.prepare(
            "id",
            job(tmp_path, dataset={"path": rows, "completion_only_loss": False}),
            tmp_path / "out",
        )


def test_a_job_that_no_lane_can_hold_is_refused_with_the_number_that_flexft_plan_names(
    model_config: Any, engine_limits: EngineLimits, tmp_path: Path
) -> None:
    limits = dataclasses.replace(engine_limits, memory_bytes=lambda: 1000.0)
    wanted = job(tmp_path)
    with pytest.raises(ValueError, match="memory_gib") as refusal:
        Admission(model_config, limits, frozenset()).prepare("id", wanted, tmp_path / "out")
    (enough,) = re.findall(r"memory_gib ([0-9.]+)", str(refusal.value))
    (longest,) = re.findall(r"for (\d+) tokens", str(refusal.value))
    dataset = wanted.dataset.model_copy(update={"max_length": int(longest)})
    planned = plan_job(
        limits.shape,
        wanted.model_copy(update={"dataset": dataset}),
        dtype="float32",
        budget_gib=float("inf"),
    )
    assert 0 <= float(enough) - planned.floor / 2**30 < 0.001
    limits = dataclasses.replace(engine_limits, memory_bytes=lambda: float(enough) * 2**30)
    assert Admission(model_config, limits, frozenset()).prepare("id", wanted, tmp_path / "out")


def test_a_reserved_name_is_refused(admission: Admission, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="name: 'served' is already used"):
        admission.prepare("id", job(tmp_path, name="served"), tmp_path / "out")


@pytest.mark.parametrize(("rank", "enough"), [(17, 32), (65, 128), (256, 256), (300, 320)])
def test_a_rank_that_is_too_high_is_refused_with_a_value_that_vllm_takes(
    rank: int, enough: int, admission: Admission, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=f"{rank} is more .* --max-lora-rank {enough}$"):
        admission.prepare("id", job(tmp_path, peft={"r": rank}), tmp_path / "out")


def test_a_refused_job_leaves_no_folder(admission: Admission, tmp_path: Path) -> None:
    with pytest.raises(ValueError):
        admission.prepare("id", job(tmp_path, peft={"r": 99}), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_output_dir_below_a_file_is_refused(admission: Admission, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for output_dir in (tmp_path / "file", tmp_path / "file" / "out"):
        with pytest.raises(ValueError, match=f"output_dir: {tmp_path}/file is no folder"):
            admission.prepare("id", job(tmp_path), output_dir)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_an_output_dir_without_permission_is_refused(admission: Admission, tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(ValueError, match="locked cannot be written"):
        admission.prepare("id", job(tmp_path), tmp_path / "locked" / "out")


def test_files_of_something_else_are_named_and_stay(
    admission: Admission, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    for name in ("notes.txt", "metrics.jsonl", ".hidden"):
        (out / name).write_text("")
    (out / "checkpoint-best").mkdir()
    admission.prepare("id", job(tmp_path), out)
    told = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert told == [
        f"[job] output_dir {out} holds files of something else, which stay: "
        "checkpoint-best, notes.txt"
    ]
    assert (out / "notes.txt").exists()


def test_a_rank_is_refused_with_where_the_limit_comes_from(
    model_config: Any, engine_limits: EngineLimits, tmp_path: Path
) -> None:
    for given, said in ((True, "the server was started with"), (False, "jobs named at its start")):
        limits = dataclasses.replace(engine_limits, rank_was_given=given)
        with pytest.raises(ValueError, match=said):
            Admission(model_config, limits, ()).prepare(
                "id", job(tmp_path, peft={"r": 17}), tmp_path / "out"
            )
