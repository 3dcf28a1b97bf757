"""vllm_flexft/publish/writer.py"""

import threading
import time
from dataclasses import replace

import pytest
import torch

from vllm_flexft.publish import fsops
from vllm_flexft.publish.adapter_files import read_adapter
from vllm_flexft.publish.checkpoint import TrainState, latest_checkpoint, read_checkpoint
from vllm_flexft.publish.final import read_final
from vllm_flexft.publish.manifest import CheckpointError
from vllm_flexft.publish.writer import CheckpointWriter, WriteRequest


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


@pytest.fixture
def writer():
    writer = CheckpointWriter()
    yield writer
    writer.close()


@pytest.fixture
def request_for(out, make_state, peft):
    def make(step, kind="checkpoint", **keys) -> WriteRequest:
        return WriteRequest(kind, out, make_state(step), peft, "base", "c", **keys)

    return make


@pytest.fixture
def slow_disk(monkeypatch):
    """Writes wait until the returned event is set."""
    go, real = threading.Event(), fsops.write
    monkeypatch.setattr(fsops, "write", lambda *args: (go.wait(60), real(*args)))
    yield go
    go.set()


def test_a_checkpoint_is_written_and_reported_once(writer, request_for, out) -> None:
    ticket = writer.submit(request_for(5))
    assert writer.drain(120)
    [result] = writer.poll()
    assert (result.ticket, result.kind, result.step, result.error) == (
        ticket,
        "checkpoint",
        5,
        None,
    )
    assert result.path == out / "checkpoint-5" == latest_checkpoint(out)
    assert writer.poll() == []


def test_a_final_adapter_is_published(writer, request_for, out) -> None:
    writer.submit(request_for(9, "final"))
    assert writer.drain(120)
    assert writer.poll()[0].path == out
    assert read_final(out).step == 9


def test_submit_does_not_wait_for_the_disk(writer, request_for, slow_disk) -> None:
    started = time.monotonic()
    writer.submit(request_for(1))
    writer.submit(request_for(2))
    assert time.monotonic() - started < 5  # the disk would take 60 s
    assert not writer.drain(0.05)
    assert writer.poll() == []


def test_the_masters_may_change_while_a_write_waits(
    writer, request_for, slow_disk, make_state, out
) -> None:
    request = request_for(1)
    writer.submit(request)
    for tensor in request.state.adapter.values():
        tensor.zero_()
    slow_disk.set()
    assert writer.drain(120)
    written = read_checkpoint(out / "checkpoint-1").adapter
    assert all(torch.equal(written[k], t) for k, t in make_state(1).adapter.items())


def test_a_checkpoint_and_the_final_adapter_share_one_copy_of_their_state(
    writer, request_for, out, make_state, monkeypatch
) -> None:
    copies, snapshot = [], TrainState.snapshot
    monkeypatch.setattr(
        TrainState, "snapshot", lambda self: copies.append(snapshot(self)) or copies[-1]
    )
    checkpoint = request_for(9)
    writer.submit(checkpoint, replace(checkpoint, kind="final"))
    for tensor in checkpoint.state.adapter.values():
        tensor.zero_()
    assert writer.drain(120)
    assert len(copies) == 1
    expected = make_state(9).adapter
    for folder in (out / "checkpoint-9", out):
        written, _ = read_adapter(folder)
        assert all(torch.equal(written[k], t) for k, t in expected.items())


def test_an_error_becomes_a_result_and_the_next_write_goes_on(writer, request_for, out) -> None:
    out.write_text("a file in the way")
    writer.submit(request_for(1))
    assert writer.drain(120)
    out.unlink()
    writer.submit(request_for(2))
    assert writer.drain(120)
    failed, written = writer.poll()
    assert isinstance(failed.error, CheckpointError)
    assert failed.path is None
    assert "Not a directory" in str(failed.error)
    assert written.path == out / "checkpoint-2"


def test_even_a_dying_write_is_reported(writer, request_for, monkeypatch) -> None:
    def die(*args):
        raise SystemExit("out of the blue")

    monkeypatch.setattr(fsops, "write", die)
    writer.submit(request_for(1))
    assert writer.drain(120)
    assert isinstance(writer.poll()[0].error, SystemExit)


def test_a_slow_disk_skips_checkpoints_but_never_the_final_adapter(
    request_for, slow_disk, out
) -> None:
    writer = CheckpointWriter(max_waiting=1)
    writer.submit(request_for(1))
    while writer._waiting:  # until the thread has taken it
        time.sleep(0.001)
    for step in (2, 3):
        writer.submit(request_for(step))
    writer.submit(request_for(4, "final"))
    [skipped] = writer.poll()
    assert (skipped.step, skipped.path) == (3, None)
    assert "raise training.save_steps" in str(skipped.error)
    slow_disk.set()
    assert writer.close(120)
    assert [(r.kind, r.step, r.error) for r in writer.poll()] == [
        ("checkpoint", 1, None),
        ("checkpoint", 2, None),
        ("final", 4, None),
    ]
    assert read_final(out).step == 4


def test_close_writes_what_waits(request_for, out) -> None:
    writer = CheckpointWriter()
    writer.submit(request_for(1))
    assert writer.close(120)
    assert latest_checkpoint(out).name == "checkpoint-1"
