"""A folder's manifest: what it holds, with the SHA-256 of every file and of the manifest itself."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vllm_flexft.publish.fsops import FileSum, read_sum

FORMAT = 1


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be read or written; the message names the file and the problem."""


@dataclass(frozen=True)
class Manifest:
    step: int
    config_hash: str
    files: Mapping[str, FileSum]

    def encode(self) -> bytes:
        body = {"format": FORMAT, **asdict(self)}
        return json.dumps({**body, "sha256": _digest(body)}, indent=2).encode() + b"\n"


def read_manifest(path: Path) -> Manifest:
    """Raises CheckpointError if it is missing, damaged, or of a newer format."""
    try:
        body = json.loads(path.read_bytes())
        recorded = body.pop("sha256")
        if recorded != _digest(body):
            raise CheckpointError(f"{path} is damaged: its own checksum does not match")
        if body.pop("format") != FORMAT:
            raise CheckpointError(f"{path} was written by another version of vllm-flexft")
        files = {name: FileSum(**s) for name, s in body.pop("files").items()}
        return Manifest(files=files, **body)
    except OSError as e:
        raise CheckpointError(f"{path} cannot be read: {e.strerror}") from e
    except (ValueError, TypeError, KeyError, AttributeError) as e:
        raise CheckpointError(f"{path} is damaged: {e}") from e


def verify_files(folder: Path, manifest: Manifest) -> None:
    """Raises CheckpointError unless every file of the manifest is there, byte for byte."""
    for name, expected in manifest.files.items():
        path = folder / name
        try:
            if path.stat().st_size != expected.size:
                raise CheckpointError(
                    f"{path} is damaged: {path.stat().st_size} bytes instead of {expected.size}"
                )
            if read_sum(path) != expected:
                raise CheckpointError(f"{path} is damaged: its SHA-256 does not match")
        except OSError as e:
            raise CheckpointError(f"{path} cannot be read: {e.strerror}") from e


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
