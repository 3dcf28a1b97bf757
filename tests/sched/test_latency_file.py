from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest
from harness.plant import PRIOR, Plant

from vllm_flexft.sched.latency import NUM_FEATURES, LatencyModel
from vllm_flexft.sched.latency_file import WORTH_KEEPING, LatencyFile

ONE = np.ones(NUM_FEATURES)


def learnt(steps: int = WORTH_KEEPING) -> LatencyModel:
    model, plant = LatencyModel(PRIOR), Plant()
    for _ in range(steps):
        features = plant.step()
        model.observe(features, plant.seconds(features))
    return model


def test_the_next_start_is_warm(tmp_path: Path):
    model, fresh = learnt(), LatencyModel(PRIOR)
    LatencyFile(tmp_path / "flexft", {"model": "a"}).save(model.state())
    assert LatencyFile(tmp_path / "flexft", {"model": "a"}).load(fresh)
    assert fresh.mean(ONE) == pytest.approx(model.mean(ONE))


def test_a_start_that_saw_few_steps_leaves_no_file(tmp_path: Path):
    LatencyFile(tmp_path, {}).save(learnt(10).state())
    assert not list(tmp_path.iterdir())


def test_another_machine_or_model_has_another_file(tmp_path: Path):
    LatencyFile(tmp_path, {"device": "a"}).save(learnt().state())
    fresh = LatencyModel(PRIOR)
    assert not LatencyFile(tmp_path, {"device": "b"}).load(fresh)
    assert fresh.num_observed == 0


def test_without_a_file_nothing_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.INFO, "vllm.flexft"):
        assert not LatencyFile(tmp_path, {}).load(LatencyModel(PRIOR))
    assert not caplog.records


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff\xfe", b"[]", b"{}", b'{"identity": {}, "state": {}}', b"null"],
)
def test_a_corrupt_file_is_ignored_with_a_log_line(
    content: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    file, fresh = LatencyFile(tmp_path, {}), LatencyModel(PRIOR)
    file.path.write_bytes(content)
    before = fresh.mean(ONE)
    with caplog.at_level(logging.WARNING, "vllm.flexft"):
        assert not file.load(fresh)
    assert str(file.path) in caplog.text
    assert fresh.mean(ONE) == before


def test_a_file_of_another_engine_under_this_name_is_ignored(tmp_path: Path):
    file = LatencyFile(tmp_path, {"model": "a"})
    file.save(learnt().state())
    content = json.loads(file.path.read_text())
    content["identity"]["model"] = "b"
    file.path.write_text(json.dumps(content))
    assert not file.load(LatencyModel(PRIOR))


def test_a_failed_write_keeps_the_old_file_and_leaves_nothing_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    file = LatencyFile(tmp_path, {})
    file.save(learnt().state())
    before = file.path.read_bytes()

    def fails(*args: object) -> None:
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", fails)
        file.save(learnt().state())
    assert file.path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [file.path]
