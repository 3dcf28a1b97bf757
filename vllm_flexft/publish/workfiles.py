"""Hidden names for what is being written or removed, and their cleaning up after dead runs.

A name is `.tmp-<what>-<pid>-<start time>`; nobody reads such a path, so it may be in any state.
"""

import os
import re
from pathlib import Path

from vllm_flexft.jobs.owner import start_time
from vllm_flexft.publish import fsops

_NAME = re.compile(r"\.tmp-.+-(\d+)-(\w+|-)")


def work_path(folder: Path, what: str) -> Path:
    """The path in `folder` under which this process writes or removes `what`."""
    pid = os.getpid()
    return folder / f".tmp-{what}-{pid}-{start_time(pid)}"


def sweep(folder: Path) -> None:
    """Remove what dead runs, or earlier failures of this process, left half done in `folder`.

    Call it only between this process's own writes to `folder`. What another living process is
    writing stays.
    """
    for path in sorted(folder.iterdir()):
        if match := _NAME.fullmatch(path.name):
            pid, started = int(match[1]), match[2]
            if pid == os.getpid() or start_time(pid) != started:
                fsops.rmtree(path)
