"""The process behind `DatasetPreparer`: a request a line on stdin, answers on stdout.

python -m vllm_flexft.data.prepare PARENT_PID
"""

from __future__ import annotations

import ctypes
import functools
import importlib.machinery
import json
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from dataclasses import asdict
from types import ModuleType
from typing import Any

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def main(parent: int) -> None:
    """Answer requests until the parent closes the pipe; die with it."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        return
    os.nice(19)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent to act on
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # libraries print, as `datasets` does
    for line in sys.stdin.buffer:
        for part in _answer(json.loads(line)):
            answers.write(part)
        answers.flush()


def _answer(request: dict[str, Any]) -> list[Any]:
    try:
        data = _load(request)
        if data is None:
            return [_line({})]
    except (ValueError, OSError) as error:  # DataError among them: the user's to mend
        return [_line({"error": str(error)})]
    except Exception as error:
        traceback.print_exc()
        return [_line({"error": f"{type(error).__name__}: {error}"})]
    return [_line({"report": asdict(data.report)}), *data.arrays]


def _load(request: dict[str, Any]) -> Any:
    source = request["tokenizer"]
    if not source["trust_remote_code"]:
        _hide_torch()
    from vllm_flexft.config import DatasetConfig
    from vllm_flexft.data.dataset import TrainingData, check_first_rows

    config = DatasetConfig.model_validate(request["dataset"])
    tokenizer = _tokenizer(source["name"], source["revision"], source["trust_remote_code"])
    limit = request["max_model_len"]
    if request["first_rows"]:
        return check_first_rows(config, tokenizer, max_model_len=limit)
    return TrainingData.load(config, tokenizer, max_model_len=limit)


@functools.cache
def _tokenizer(name: str, revision: str | None, trust_remote_code: bool) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(
        name, revision=revision, trust_remote_code=trust_remote_code
    )


def _line(body: dict[str, Any]) -> bytes:
    return json.dumps(body).encode() + b"\n"


class _PathFinder(importlib.machinery.PathFinder):
    """Finds everything but torch."""

    @classmethod
    def find_spec(
        cls, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        return None if fullname == "torch" else super().find_spec(fullname, path, target)


def _hide_torch() -> None:
    """transformers imports torch where it finds it: four seconds and 300 MB, for no use here."""
    sys.meta_path[:] = [
        _PathFinder if finder is importlib.machinery.PathFinder else finder
        for finder in sys.meta_path
    ]


if __name__ == "__main__":
    main(int(sys.argv[1]))
