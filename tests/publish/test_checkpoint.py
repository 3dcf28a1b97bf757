"""vllm_flexft/publish/checkpoint.py and final.py without crashes; with them: test_crashes.py"""

import dataclasses
import errno
import os
import subprocess
import sys

import pytest
import torch

from vllm_flexft.config import FinetuneJob
from vllm_flexft.publish import checkpoint, fsops
from vllm_flexft.publish.adapter_files import CONFIG_FILE, WEIGHTS_FILE, read_adapter
from vllm_flexft.publish.checkpoint import (
    checkpoints,
    latest_checkpoint,
    read_checkpoint,
    remove_checkpoint,
    surplus,
    write_checkpoint,
)
from vllm_flexft.publish.final import publish_final, read_final, write_job_file
from vllm_flexft.publish.manifest import CheckpointError

FILES = [
    "adapter_config.json",
    "adapter_model.safetensors",
    "manifest.json",
    "optimizer.safetensors",
    "trainer_state.json",
]


@pytest.fixture
def write(tmp_path, make_state, peft):
    return lambda step, config_hash="c1": write_checkpoint(
        tmp_path / "out", make_state(step), peft, "base", config_hash
    )


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def assert_same_state(a, b) -> None:
    def plain(state):
        fields = dataclasses.asdict(state)
        tensors = {"adapter": fields.pop("adapter"), **fields.pop("optimizer")}
        return fields, {f"{k}/{n}": t for k, group in tensors.items() for n, t in group.items()}

    (fields_a, tensors_a), (fields_b, tensors_b) = plain(a), plain(b)
    assert fields_a == fields_b
    assert tensors_a.keys() == tensors_b.keys()
    for name, tensor in tensors_a.items():
        assert tensor.dtype == tensors_b[name].dtype
        assert torch.equal(tensor, tensors_b[name])


def flip_a_byte(path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_a_state_comes_back_bit_for_bit(write, make_state) -> None:
    assert_same_state(read_checkpoint(write(7)), make_state(7))


def test_a_state_without_moments_comes_back(tmp_path, make_state, peft) -> None:
    state = dataclasses.replace(make_state(1), optimizer={})
    read = read_checkpoint(write_checkpoint(tmp_path, state, peft, "base", "c"))
    assert read.optimizer == {}


def test_a_checkpoint_is_an_adapter_too(write, make_state) -> None:
    path = write(7)
    assert sorted(p.name for p in path.iterdir()) == FILES
    tensors, _ = read_adapter(path)
    assert all(torch.equal(tensors[k], t) for k, t in make_state(7).adapter.items())


def test_the_latest_is_the_one_of_the_largest_step(write, out) -> None:
    assert latest_checkpoint(out) is None
    for step in (9, 10, 100, 20):
        write(step)
    assert latest_checkpoint(out).name == "checkpoint-100"


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", [flip_a_byte, os.unlink, lambda p: os.truncate(p, 10)])
def test_a_damaged_one_is_named_and_passed_over(name, damage, write, out, caplog) -> None:
    older, newer = write(1), write(2)
    damage(newer / name)
    with pytest.raises(CheckpointError, match=str(newer / name)):
        read_checkpoint(newer)
    assert latest_checkpoint(out) == older
    assert "checkpoint-2" in caplog.text


def test_a_renamed_checkpoint_is_refused(write, out) -> None:
    write(1).rename(out / "checkpoint-5")
    with pytest.raises(CheckpointError, match="is of step 1"):
        read_checkpoint(out / "checkpoint-5")


def test_another_configurations_checkpoint_is_not_resumed_from(write, out) -> None:
    write(1, "c1")
    assert latest_checkpoint(out, "c1") is not None
    with pytest.raises(CheckpointError, match="another configuration; choose another output_dir"):
        latest_checkpoint(out, "c2")


class TestWritingTwice:
    def test_a_sound_checkpoint_is_kept_untouched(self, write) -> None:
        path = write(3)
        before = {p: p.stat().st_mtime_ns for p in path.iterdir()}
        assert write(3) == path
        assert {p: p.stat().st_mtime_ns for p in path.iterdir()} == before

    def test_a_damaged_checkpoint_is_replaced(self, write, out) -> None:
        flip_a_byte(write(3) / WEIGHTS_FILE)
        read_checkpoint(write(3))
        assert os.listdir(out) == ["checkpoint-3"]

    def test_a_checkpoint_of_another_job_is_refused(self, write) -> None:
        write(3, "c1")
        with pytest.raises(CheckpointError, match="another configuration"):
            write(3, "c2")


class TestSurplus:
    def test_the_newest_stay(self, write, out) -> None:
        for step in (1, 2, 3, 4):
            write(step)
        assert [p.name for p in surplus(out, 2)] == ["checkpoint-2", "checkpoint-1"]

    def test_a_removed_one_leaves_nothing(self, write, out) -> None:
        write(1)
        remove_checkpoint(write(2))
        assert os.listdir(out) == ["checkpoint-1"]

    def test_the_last_sound_one_stays_behind_damaged_newer_ones(self, write, out) -> None:
        write(1)
        sound = write(2)
        for step in (3, 4):
            flip_a_byte(write(step) / "optimizer.safetensors")
        assert sound not in surplus(out, 1)
        assert out / "checkpoint-1" in surplus(out, 1)

    def test_no_limit_removes_nothing(self, write, out) -> None:
        write(1)
        write(2)
        assert surplus(out, None) == []


class TestLeftovers:
    def test_those_of_a_dead_process_are_swept(self, write, out) -> None:
        write(1)
        dead = out / ".tmp-checkpoint-2-4194305-123"  # a pid above the kernel's largest
        dead.mkdir()
        (dead / WEIGHTS_FILE).write_text("half")
        (out / ".tmp-final.json-4194305-123").write_text("half")
        write(2)
        assert sorted(os.listdir(out)) == ["checkpoint-1", "checkpoint-2"]

    def test_those_of_a_living_process_stay(self, write, out) -> None:
        code = (
            "import sys; from pathlib import Path; from vllm_flexft.publish import workfiles;"
            "workfiles.work_path(Path(sys.argv[1]), 'checkpoint-2').mkdir(parents=True);"
            "print(flush=True); sys.stdin.read()"
        )
        with subprocess.Popen(
            [sys.executable, "-c", code, str(out)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as other:
            other.stdout.readline()
            write(1)
            assert len(os.listdir(out)) == 2
            other.communicate()


class TestErrors:
    def test_a_full_disk_is_reported_and_leaves_nothing(self, write, out, monkeypatch) -> None:
        older = write(1)

        def no_space(file, data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(fsops, "write", no_space)
        with pytest.raises(CheckpointError, match=r"checkpoint-2 cannot be written.*No space left"):
            write(2)
        assert os.listdir(out) == [older.name]

    def test_an_output_dir_that_is_a_file_is_reported(self, write, out) -> None:
        out.write_text("")
        with pytest.raises(CheckpointError, match="Not a directory"):
            write(1)

    def test_nan_counters_are_refused_before_anything_is_visible(
        self, tmp_path, make_state, peft
    ) -> None:
        state = dataclasses.replace(make_state(1), counters={"loss": float("nan")})
        with pytest.raises(ValueError, match="JSON"):
            write_checkpoint(tmp_path, state, peft, "base", "c")
        assert checkpoints(tmp_path) == []


class TestFinal:
    def test_it_is_an_adapter_and_marks_the_run_as_finished(self, out, make_state, peft) -> None:
        assert read_final(out) is None
        assert publish_final(out, make_state(9), peft, "base", "c") == out
        assert sorted(os.listdir(out)) == [CONFIG_FILE, WEIGHTS_FILE, "final.json"]
        final = read_final(out)
        assert (final.path, final.step, final.config_hash) == (out, 9, "c")
        tensors, _ = read_adapter(out)
        assert all(torch.equal(tensors[k], t) for k, t in make_state(9).adapter.items())

    def test_publishing_again_changes_nothing(self, out, make_state, peft) -> None:
        publish_final(out, make_state(9), peft, "base", "c")
        before = (out / WEIGHTS_FILE).read_bytes()
        publish_final(out, make_state(10), peft, "base", "c")
        assert (out / WEIGHTS_FILE).read_bytes() == before

    def test_another_jobs_adapter_is_not_overwritten(self, out, make_state, peft) -> None:
        publish_final(out, make_state(9), peft, "base", "c1")
        with pytest.raises(CheckpointError, match="another configuration"):
            publish_final(out, make_state(9), peft, "base", "c2")

    def test_an_adapter_of_unknown_origin_is_not_overwritten(self, out, make_state, peft) -> None:
        out.mkdir()
        (out / CONFIG_FILE).write_text("{}")
        with pytest.raises(CheckpointError, match="an adapter that no job wrote"):
            publish_final(out, make_state(9), peft, "base", "c")
        assert os.listdir(out) == [CONFIG_FILE]

    def test_a_damaged_final_adapter_is_named(self, out, make_state, peft) -> None:
        publish_final(out, make_state(9), peft, "base", "c")
        flip_a_byte(out / WEIGHTS_FILE)
        with pytest.raises(CheckpointError, match=f"{WEIGHTS_FILE} is damaged"):
            read_final(out)


def test_the_job_file_reads_back_as_the_job(out) -> None:
    job = FinetuneJob.from_mapping({"name": "x", "dataset": {"path": "train.jsonl"}})
    write_job_file(out, job)
    path = write_job_file(out, job)  # a resume writes it again
    assert FinetuneJob.from_yaml(path) == job
    assert os.listdir(out) == ["job.yaml"]


def test_a_snapshot_shares_no_memory_with_the_masters(make_state) -> None:
    live = make_state(3)
    snapshot = live.snapshot()
    assert_same_state(snapshot, make_state(3))
    for tensors in (live.adapter, *live.optimizer.values()):
        for tensor in tensors.values():
            tensor.zero_()
    live.counters["num_tokens"] = 0
    assert_same_state(snapshot, make_state(3))


def test_a_checkpoint_found_sound_just_before_is_read_without_its_sums(
    write, out, make_state, monkeypatch
):
    path = write(1)
    assert latest_checkpoint(out) == path
    monkeypatch.setattr(checkpoint, "verify_files", lambda *_: pytest.fail("hashed again"))
    assert_same_state(read_checkpoint(path, verify=False), make_state(1))
