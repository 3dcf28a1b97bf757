"""Checkpoints that survive kill -9 and power cuts at any instruction.

    checkpoint-N/adapter_model.safetensors   fp32 A and B    } together a PEFT adapter,
    checkpoint-N/adapter_config.json                         } which can be served as it is
    checkpoint-N/optimizer.safetensors       moments, as "exp_avg/<adapter_key>"
    checkpoint-N/trainer_state.json          step, counters, recent metrics
    checkpoint-N/manifest.json               SHA-256 of each

It is written into a hidden sibling folder, every file and folder is synced, and one rename makes
it visible: a `checkpoint-N` is complete or is not there. None is ever changed.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from vllm_flexft.config import PeftConfig
from vllm_flexft.publish import fsops
from vllm_flexft.publish.adapter_files import WEIGHTS_FILE, write_adapter
from vllm_flexft.publish.manifest import (
    CheckpointError,
    Manifest,
    read_manifest,
    verify_files,
)
from vllm_flexft.publish.tensor_file import safetensors_chunks
from vllm_flexft.publish.workfiles import sweep, work_path

logger = logging.getLogger("vllm.flexft")

OPTIMIZER_FILE = "optimizer.safetensors"
STATE_FILE = "trainer_state.json"
MANIFEST_FILE = "manifest.json"
_NAME = re.compile(r"checkpoint-(\d+)")

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class TrainState:
    """All that a run needs to go on as if it had never stopped.

    The place in the data and the learning rate are functions of `step`, and early stopping goes by
    the counters. Everything that is not a tensor must be plain JSON, with finite floats; they come
    back bit for bit.
    """

    step: int  # optimizer steps done
    adapter: Tensors  # fp32 masters by `adapter_key`
    optimizer: Mapping[str, Tensors]  # e.g. {"exp_avg": {adapter_key: ...}, "exp_avg_sq": ...}
    counters: Mapping[str, Any] = field(default_factory=dict)  # num_tokens, best_eval_loss, ...
    log_history: Sequence[Mapping[str, Any]] = ()  # recent lines of metrics.jsonl

    def snapshot(self) -> TrainState:
        """A copy on CPU that shares no memory with the live masters and moments."""

        def copy(tensors: Tensors) -> dict[str, torch.Tensor]:
            return {k: t.detach().to("cpu", copy=True) for k, t in tensors.items()}

        return replace(
            self,
            adapter=copy(self.adapter),
            optimizer={name: copy(t) for name, t in self.optimizer.items()},
            counters=dict(self.counters),
            log_history=[dict(line) for line in self.log_history],
        )


def write_checkpoint(
    output_dir: Path, state: TrainState, peft: PeftConfig, base_model: str, config_hash: str
) -> Path:
    """Write `output_dir/checkpoint-{step}` and return it.

    If it is there already, whole and of the same job, it is kept: it may be being served.
    Raises CheckpointError (disk full, no permission, a checkpoint of another job in the way).
    """
    target = output_dir / f"checkpoint-{state.step}"
    work = work_path(output_dir, target.name)
    trash = work_path(output_dir, f"damaged-{target.name}")
    try:
        fsops.makedirs(output_dir)
        sweep(output_dir)
        if _keep_existing(target, config_hash):
            return target
        fsops.mkdir(work)
        files = dict(write_adapter(work, state.adapter, peft, base_model))
        files[OPTIMIZER_FILE] = fsops.write_file(
            work / OPTIMIZER_FILE, safetensors_chunks(_flat_tensors(state))
        )
        files[STATE_FILE] = fsops.write_file(work / STATE_FILE, [_encode_state(state)])
        manifest = Manifest(state.step, config_hash, files)
        fsops.write_file(work / MANIFEST_FILE, [manifest.encode()])
        fsops.fsync_dir(work)
        if target.exists():
            fsops.rename(target, trash)
            fsops.fsync_dir(output_dir)  # renames may reach the disk in another order
        fsops.rename(work, target)
        fsops.fsync_dir(output_dir)
        fsops.rmtree(trash)
    except OSError as e:
        _discard(work)
        raise CheckpointError(f"{target} cannot be written: {e}") from e
    return target


def checkpoints(output_dir: Path) -> list[Path]:
    """The checkpoint folders of a run, newest first, sound or not."""
    if not output_dir.is_dir():
        return []
    steps = [int(m[1]) for p in output_dir.iterdir() if (m := _NAME.fullmatch(p.name))]
    return [output_dir / f"checkpoint-{step}" for step in sorted(steps, reverse=True)]


def latest_checkpoint(output_dir: Path, config_hash: str | None = None) -> Path | None:
    """The newest checkpoint that verifies; a damaged one is passed over with a warning.

    With `config_hash`, raises CheckpointError if that checkpoint is of another configuration:
    going on from it would be wrong, and starting afresh would collide with it.
    """
    for path in checkpoints(output_dir):
        try:
            manifest = _verify(path)
        except CheckpointError as e:
            logger.warning("passing over a damaged checkpoint: %s", e)
            continue
        if config_hash not in (None, manifest.config_hash):
            raise _foreign(path)
        return path
    return None


def sound_checkpoints(output_dir: Path, config_hash: str) -> list[tuple[int, Path]]:
    """Step and folder of every checkpoint of this configuration that verifies, oldest first."""
    found = []
    for path in reversed(checkpoints(output_dir)):
        try:
            manifest = _verify(path)
        except CheckpointError:
            continue
        if manifest.config_hash == config_hash:
            found.append((manifest.step, path))
    return found


def read_checkpoint(path: Path, *, verify: bool = True) -> TrainState:
    """Read a checkpoint. Raises CheckpointError naming the file and the problem.

    `verify=False` leaves out the sums, of one that was found by `latest_checkpoint` just before.
    """
    manifest = _verify(path) if verify else read_manifest(path / MANIFEST_FILE)
    try:
        adapter = load_file(path / WEIGHTS_FILE)
        flat = load_file(path / OPTIMIZER_FILE)
        state = json.loads((path / STATE_FILE).read_bytes())
        optimizer: dict[str, dict[str, torch.Tensor]] = {n: {} for n in state["optimizer"]}
        for key, tensor in flat.items():
            kind, _, name = key.partition("/")
            optimizer[kind][name] = tensor
        return TrainState(
            manifest.step, adapter, optimizer, state["counters"], state["log_history"]
        )
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as e:
        raise CheckpointError(f"{path} cannot be read: {e!r}") from e


def surplus(output_dir: Path, save_total_limit: int | None) -> list[Path]:
    """Checkpoints beyond the newest `save_total_limit` sound ones.

    Damaged checkpoints do not count, so the last sound one is never among them.
    """
    if save_total_limit is None:
        return []
    assert save_total_limit > 0
    sound, found = 0, []
    for path in checkpoints(output_dir):
        if sound < save_total_limit:
            sound += _is_sound(path)
        else:
            found.append(path)
    return found


def remove_checkpoint(path: Path) -> None:
    """Renamed away first: a checkpoint is never seen half removed. Raises CheckpointError."""
    trash = work_path(path.parent, f"pruned-{path.name}")
    try:
        fsops.rename(path, trash)
        fsops.fsync_dir(path.parent)
        fsops.rmtree(trash)
    except OSError as e:
        raise CheckpointError(f"{path} cannot be removed: {e}") from e


def _keep_existing(target: Path, config_hash: str) -> bool:
    if not target.exists():
        return False
    try:
        manifest = _verify(target)
    except CheckpointError as e:
        logger.warning("writing a damaged checkpoint anew: %s", e)
        return False
    if manifest.config_hash != config_hash:
        raise _foreign(target)
    return True


def _verify(path: Path) -> Manifest:
    manifest = read_manifest(path / MANIFEST_FILE)
    if manifest.step != _step(path):
        raise CheckpointError(f"{path / MANIFEST_FILE} is of step {manifest.step}")
    verify_files(path, manifest)
    return manifest


def _is_sound(path: Path) -> bool:
    try:
        _verify(path)
    except CheckpointError:
        return False
    return True


def _step(path: Path) -> int:
    match = _NAME.fullmatch(path.name)
    if match is None:
        raise CheckpointError(f"{path} is not named checkpoint-N")
    return int(match[1])


def _foreign(path: Path) -> CheckpointError:
    return CheckpointError(
        f"{path} was written by a job of another configuration; choose another output_dir, or "
        "move that folder away"
    )


def _discard(path: Path) -> None:
    try:
        fsops.rmtree(path)
    except OSError as e:
        logger.warning("%s is left to the next sweep: %s", path, e)


def _flat_tensors(state: TrainState) -> dict[str, torch.Tensor]:
    """Moments as "exp_avg/<adapter_key>"."""
    return {f"{k}/{n}": t for k, group in state.optimizer.items() for n, t in group.items()}


def _encode_state(state: TrainState) -> bytes:
    body = {
        "step": state.step,
        "optimizer": sorted(state.optimizer),
        "counters": state.counters,
        "log_history": list(state.log_history),
    }
    return json.dumps(body, indent=2, allow_nan=False).encode() + b"\n"
