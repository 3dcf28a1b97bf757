"""A crash at every single file-system operation of writing, pruning and publishing.

Three kinds of crash are played at each operation:
- kill -9: what was done stays done, a write in progress is cut in half;
- power cut: besides, every file content that was not synced is lost, and so is every creation,
  renaming and removal in a folder that was not synced since;
- reordering power cut: the same, but the very last of these changes of names reached the disk
  before all the others.
"""

import contextlib
import itertools
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from vllm_flexft.publish import fsops
from vllm_flexft.publish.adapter_files import CONFIG_FILE, read_adapter
from vllm_flexft.publish.checkpoint import (
    checkpoints,
    latest_checkpoint,
    read_checkpoint,
    remove_checkpoint,
    surplus,
    write_checkpoint,
)
from vllm_flexft.publish.final import publish_final, read_final, write_job_file


class Crash(BaseException):
    """Not an Exception, so that no error handling of the code under test can run on it."""


class FaultyDisk:
    """Wraps every primitive of fsops; crashes instead of operation number `crash_at`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, spare: Path) -> None:
        self.count = 0
        self.crash_at: int | None = None
        self._undo: list[tuple[int, Callable[[], object]]] = []  # (folder's inode, its loss)
        self._unsynced: set[int] = set()  # inodes
        self._folders: dict[int, int] = {}  # inode -> descriptor
        self._dead = False
        self._spare = spare
        self._names = itertools.count()
        spare.mkdir()
        for name in fsops.PRIMITIVES:
            real = getattr(fsops, name)
            monkeypatch.setattr(fsops, name, self._wrap(name, real))

    def _wrap(self, name: str, real: Callable) -> Callable:
        def operation(*args):
            # A dead process does nothing more, whatever its `finally` blocks try.
            if self._dead:
                raise Crash
            if self.count == self.crash_at:
                self._dead = True
                if name == "write":
                    file, data = args
                    real(file, data[: len(data) // 2])
                raise Crash
            self.count += 1
            if name == "fsync_file":  # only accounted for: the machine does not really crash
                return self._unsynced.discard(os.fstat(args[0].fileno()).st_ino)
            if name == "fsync_dir":
                synced = args[0].stat().st_ino
                self._undo = [u for u in self._undo if u[0] != synced]
                return None
            if name == "write":
                self._unsynced.add(os.fstat(args[0].fileno()).st_ino)
                return real(*args)
            undo = getattr(self, f"_undo_{name}")(*map(self._through_folder, args))
            self._undo.append((args[-1].parent.stat().st_ino, undo))
            return real(*args)

        return operation

    def _through_folder(self, path: Path) -> Path:
        """The same file, found even after its folder is renamed; lost with its folder."""
        inode = path.parent.stat().st_ino
        if inode not in self._folders:
            self._folders[inode] = os.open(path.parent, os.O_RDONLY)
        return Path(f"/proc/self/fd/{self._folders[inode]}") / path.name

    def _undo_create(self, path):
        return path.unlink

    def _undo_mkdir(self, path):
        return lambda: shutil.rmtree(path)

    def _undo_rename(self, source, target):
        if not target.is_file():
            return lambda: target.rename(source)
        saved = self._save(target)
        return lambda: (target.rename(source), shutil.move(saved, target))

    def _undo_unlink(self, path):
        saved = self._save(path)
        return lambda: os.link(saved, path)

    def _undo_rmdir(self, path):
        return path.mkdir

    def _save(self, path: Path) -> Path:
        saved = self._spare / str(next(self._names))
        os.link(path, saved)
        return saved

    def restart(self, root: Path, kind: str) -> None:
        """The machine as the next process finds it."""
        if kind != "kill -9":
            lost = self._undo[:-1] if kind == "reordering power cut" else self._undo
            for _, undo in reversed(lost):
                with contextlib.suppress(FileNotFoundError):  # its folder is gone for good
                    undo()
            for path in root.rglob("*"):
                if path.is_file() and path.stat().st_ino in self._unsynced:
                    os.truncate(path, 0)
        for descriptor in self._folders.values():
            os.close(descriptor)
        self._undo, self._unsynced, self._folders = [], set(), {}
        self.crash_at, self.count, self._dead = None, 0, False


def crash_everywhere(monkeypatch, tmp_path, prepare, act, check) -> int:
    """Play `act` with a crash at each of its operations; `check` what the next process finds.

    Returns the number of operations.
    """
    with monkeypatch.context() as patch:
        disk = FaultyDisk(patch, tmp_path / "spare")
        for kind in ("kill -9", "power cut", "reordering power cut"):
            for at in itertools.count():
                root = tmp_path / f"{kind}-{at}"
                root.mkdir()
                prepare(root / "out")
                disk.restart(root, "kill -9")  # everything so far is durable
                disk.crash_at = at
                finished = True
                try:
                    act(root / "out")
                except Crash:
                    finished = False
                disk.restart(root, kind)
                check(root / "out", finished)
                if finished:
                    assert at > 0
                    break
    return at


@pytest.fixture
def write(make_state, peft):
    return lambda out, step: write_checkpoint(out, make_state(step), peft, "base", "c")


def assert_sound(path: Path, make_state) -> None:
    state = read_checkpoint(path)
    expected = make_state(state.step)
    assert path.name == f"checkpoint-{state.step}"
    assert all(torch.equal(state.adapter[k], t) for k, t in expected.adapter.items())


@pytest.mark.parametrize("is_first", [True, False], ids=["first", "second"])
def test_writing_a_checkpoint_shows_the_old_or_the_new_one(
    is_first, monkeypatch, tmp_path, make_state, write
) -> None:
    def prepare(out: Path) -> None:
        if not is_first:
            write(out, 1)

    def check(out: Path, finished: bool) -> None:
        for path in checkpoints(out):
            assert_sound(path, make_state)
        latest = latest_checkpoint(out)
        assert (latest and latest.name) in (
            ("checkpoint-2",)
            if finished
            else (None if is_first else "checkpoint-1", "checkpoint-2")
        )
        write(out, 2)  # the next process does the work again and leaves no debris
        expected = ["checkpoint-2"] if is_first else ["checkpoint-1", "checkpoint-2"]
        assert sorted(os.listdir(out)) == expected
        assert_sound(out / "checkpoint-2", make_state)

    operations = crash_everywhere(monkeypatch, tmp_path, prepare, lambda out: write(out, 2), check)
    assert operations > 20


def test_replacing_a_damaged_checkpoint_keeps_the_older_one(
    monkeypatch, tmp_path, make_state, write
) -> None:
    def prepare(out: Path) -> None:
        write(out, 1)
        os.truncate(write(out, 2) / "optimizer.safetensors", 5)

    def check(out: Path, finished: bool) -> None:
        latest = latest_checkpoint(out)
        assert latest is not None
        assert_sound(latest, make_state)
        assert latest.name == "checkpoint-2" or not finished
        write(out, 2)
        assert sorted(os.listdir(out)) == ["checkpoint-1", "checkpoint-2"]
        assert_sound(out / "checkpoint-2", make_state)

    crash_everywhere(monkeypatch, tmp_path, prepare, lambda out: write(out, 2), check)


def remove_surplus(out: Path) -> None:
    for path in surplus(out, 2):
        remove_checkpoint(path)


def test_pruning_never_shows_half_a_checkpoint(monkeypatch, tmp_path, make_state, write) -> None:
    def prepare(out: Path) -> None:
        for step in (1, 2, 3, 4):
            write(out, step)

    def check(out: Path, finished: bool) -> None:
        left = checkpoints(out)
        for path in left:
            assert_sound(path, make_state)
        names = {p.name for p in left}
        assert {"checkpoint-4", "checkpoint-3"} <= names
        assert len(names) == 2 or not finished
        remove_surplus(out)
        write(out, 5)
        assert sorted(os.listdir(out)) == ["checkpoint-3", "checkpoint-4", "checkpoint-5"]

    operations = crash_everywhere(monkeypatch, tmp_path, prepare, remove_surplus, check)
    assert operations >= 2 * 8  # two folders: rename, sync, five files, the folder


def test_publishing_shows_no_adapter_or_the_whole_one(
    monkeypatch, tmp_path, make_state, write, peft
) -> None:
    def act(out: Path) -> None:
        publish_final(out, make_state(9), peft, "base", "c")

    def check(out: Path, finished: bool) -> None:
        assert_sound(latest_checkpoint(out), make_state)
        if finished:
            assert (out / CONFIG_FILE).exists()
        if (out / CONFIG_FILE).exists():  # then PEFT and vLLM see an adapter
            tensors, _ = read_adapter(out)
            assert all(torch.equal(tensors[k], t) for k, t in make_state(9).adapter.items())
            assert read_final(out).step == 9
        else:
            assert read_final(out) is None
        # A resumed run may end with other low bits: what is published must stay one piece.
        step = 9 if read_final(out) else 10
        publish_final(out, make_state(10), peft, "base", "c")
        assert read_final(out).step == step
        tensors, _ = read_adapter(out)
        assert all(torch.equal(tensors[k], t) for k, t in make_state(step).adapter.items())
        assert not [p for p in os.listdir(out) if p.startswith(".")]

    operations = crash_everywhere(monkeypatch, tmp_path, lambda out: write(out, 8), act, check)
    assert operations > 10


def test_the_job_file_is_whole_or_absent(monkeypatch, tmp_path) -> None:
    from vllm_flexft.config import FinetuneJob

    job = FinetuneJob.from_mapping({"name": "x", "dataset": {"path": "train.jsonl"}})

    def check(out: Path, finished: bool) -> None:
        path = out / "job.yaml"
        assert path.exists() or not finished
        if path.exists():
            assert FinetuneJob.from_yaml(path) == job
        write_job_file(out, job)
        assert os.listdir(out) == ["job.yaml"]

    crash_everywhere(
        monkeypatch, tmp_path, lambda out: None, lambda out: write_job_file(out, job), check
    )


def test_the_faulty_disk_itself_loses_what_was_not_synced(monkeypatch, tmp_path) -> None:
    disk = FaultyDisk(monkeypatch, tmp_path / "spare")
    for name, sync_content, sync_name in [
        ("a", True, True),
        ("b", False, True),
        ("c", True, False),
    ]:
        file = fsops.create(tmp_path / name)
        fsops.write(file, b"x")
        if sync_content:
            fsops.fsync_file(file)
        file.close()
        if sync_name:
            fsops.fsync_dir(tmp_path)
    with contextlib.suppress(Crash):
        disk.crash_at = disk.count
        fsops.mkdir(tmp_path / "d")
    disk.restart(tmp_path, "power cut")
    found = {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()}
    assert found == {"a": b"x", "b": b""}
