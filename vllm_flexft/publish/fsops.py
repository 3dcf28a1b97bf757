"""The only door from this package to the disk for everything that must survive a crash.

The eight primitives are called through this module's globals, by the composites below too, so
that a test can kill the process at each single operation.
"""

import contextlib
import errno
import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

PRIMITIVES = (
    "create",
    "write",
    "fsync_file",
    "fsync_dir",
    "mkdir",
    "rename",
    "unlink",
    "rmdir",
)

Buffer = bytes | memoryview


def create(path: Path) -> FileIO:
    """A new unbuffered file; FileExistsError if it exists: nothing is overwritten."""
    return FileIO(path, "xb")


def write(file: FileIO, data: Buffer) -> None:
    view = memoryview(data).cast("B")
    while view:  # one write(2) moves at most 2 GiB
        view = view[file.write(view) :]


def fsync_file(file: FileIO) -> None:
    os.fsync(file.fileno())


def fsync_dir(path: Path) -> None:
    """Make the names in `path` durable: creations, renames, removals."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def mkdir(path: Path) -> None:
    path.mkdir()


def rename(source: Path, target: Path) -> None:
    """Atomic. Replaces a file; a non-empty folder as target raises OSError."""
    source.rename(target)


def unlink(path: Path) -> None:
    path.unlink()


def rmdir(path: Path) -> None:
    path.rmdir()


@dataclass(frozen=True)
class FileSum:
    """What a manifest keeps of a file. `size` in bytes."""

    sha256: str
    size: int


def write_file(path: Path, chunks: Iterable[Buffer]) -> FileSum:
    """Create `path` and sync its content (not its name: that is `fsync_dir` of the folder)."""
    digest, size = hashlib.sha256(), 0
    with create(path) as file:
        for chunk in chunks:
            write(file, chunk)
            digest.update(chunk)
            size += len(chunk)
        fsync_file(file)
    return FileSum(digest.hexdigest(), size)


def read_sum(path: Path) -> FileSum:
    """Raises OSError if the file cannot be read."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
        return FileSum(digest.hexdigest(), file.tell())


def makedirs(path: Path) -> None:
    """Like `mkdir -p`, durable. NotADirectoryError if a file stands in the way."""
    if path.is_dir():
        return
    if path.exists():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path))
    makedirs(path.parent)
    mkdir(path)
    fsync_dir(path.parent)


def rmtree(path: Path) -> None:
    """Remove a folder, link or file, if there is one. Links are not followed.

    Another thread may be removing it as well: what is gone already is not missed.
    """
    with contextlib.suppress(FileNotFoundError):
        if path.is_symlink() or path.is_file():
            unlink(path)
        elif path.is_dir():
            for child in sorted(path.iterdir()):
                rmtree(child)
            rmdir(path)
