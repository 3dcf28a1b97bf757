"""Tokenises datasets in a process of its own, so that no request waits for it.

Parsing, chat templates and masks are Python: in a thread of the engine core they would hold the
interpreter's lock, and with it every request's next token. The process runs at the lowest priority,
dies with the thread that uses it, and answers over a pipe: a line of JSON, then the bytes of the
arrays.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from vllm_flexft.config import DatasetConfig
from vllm_flexft.data.dataset import DataReport, TrainingData
from vllm_flexft.data.files import DataError

CHECK_S = 0.2  # between two calls of `check`


@dataclass(frozen=True, slots=True)
class TokenizerSource:
    """What `AutoTokenizer.from_pretrained` needs."""

    name: str
    revision: str | None = None
    trust_remote_code: bool = False


class DatasetPreparer:
    """Loads datasets in a child process, which is started when first needed and kept for the next
    one: it takes a second to start. All calls from one thread; the child dies with it."""

    def __init__(self, tokenizer: TokenizerSource) -> None:
        self._tokenizer = tokenizer
        self._child: subprocess.Popen[bytes] | None = None
        self._used = 0.0

    @property
    def pid(self) -> int | None:
        """The child's, while there is one."""
        return None if self._child is None else self._child.pid

    def load(
        self,
        config: DatasetConfig,
        *,
        max_model_len: int,
        check: Callable[[], None] = lambda: None,
    ) -> TrainingData:
        """`TrainingData.load`, elsewhere.

        Args:
            check: called every now and then while this waits. What it raises ends the child and
                is raised here.

        Raises:
            DataError: the dataset cannot be trained on, the tokenizer cannot be loaded, or the
                child was killed.
        """
        with self._answer(config, max_model_len, check) as (answer, pipe):
            return self._read_data(answer, pipe, config.path)

    def check_first_rows(
        self,
        config: DatasetConfig,
        *,
        max_model_len: int,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        """`data.dataset.check_first_rows`, elsewhere. Arguments and errors as for `load`."""
        with self._answer(config, max_model_len, check, first_rows=True):
            pass

    @contextlib.contextmanager
    def _answer(
        self,
        config: DatasetConfig,
        max_model_len: int,
        check: Callable[[], None],
        first_rows: bool = False,
    ) -> Iterator[tuple[dict[str, Any], Any]]:
        """The child's line, and the pipe that the arrays follow on."""
        request = {
            "first_rows": first_rows,
            "dataset": config.model_dump(mode="json", include=set(DatasetConfig.model_fields)),
            "tokenizer": asdict(self._tokenizer),
            "max_model_len": max_model_len,
        }
        try:
            child = self._running_child()
            assert child.stdin is not None
            assert child.stdout is not None
            with contextlib.suppress(BrokenPipeError):  # told by the missing answer
                child.stdin.write(json.dumps(request).encode() + b"\n")
                child.stdin.flush()
            while not select.select([child.stdout], [], [], CHECK_S)[0]:
                check()
            line = child.stdout.readline()
            if not line.endswith(b"\n"):
                raise self._died(config.path)
            answer = json.loads(line)
            if "error" in answer:
                raise DataError(answer["error"])
            yield answer, child.stdout
        except DataError:
            raise
        except BaseException:
            self.close()  # it may be busy with what nobody waits for any more
            raise
        finally:
            self._used = time.monotonic()

    def close(self) -> None:
        """End the child, whatever it is doing. Safe to call twice."""
        if self._child is not None:
            self._child.kill()
            self._child.communicate()  # waits for it and closes the pipes
            self._child = None

    def close_if_unused(self, seconds: float) -> None:
        """End a child that had nothing to do for this long."""
        if self._child is not None and time.monotonic() - self._used > seconds:
            self.close()

    def _running_child(self) -> subprocess.Popen[bytes]:
        if self._child is not None and self._child.poll() is not None:
            self.close()
        if self._child is None:
            # A plain subprocess: multiprocessing would run the user's main module again, and a
            # daemonic engine process may not use it.
            self._child = subprocess.Popen(
                [sys.executable, "-P", "-m", "vllm_flexft.data.prepare", str(os.getpid())],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env={
                    **os.environ,
                    "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
                    "TRANSFORMERS_VERBOSITY": "error",
                },
            )
        return self._child

    def _read_data(self, answer: dict[str, Any], pipe: Any, path: str) -> TrainingData:
        report = DataReport(**answer["report"])
        arrays: list[Any] = [np.empty(size, dtype) for size, dtype in array_layout(report)]
        for array in arrays:
            # Straight into the array, and without the interpreter's lock.
            if pipe.readinto(memoryview(array).cast("B")) != array.nbytes:
                raise self._died(path)
        token_ids, supervised, offsets, rows = arrays
        return TrainingData(token_ids, supervised, offsets, rows, report)

    def _died(self, path: str) -> DataError:
        assert self._child is not None
        self._child.kill()
        code = self._child.wait()
        self.close()
        how = (
            f"was killed by signal {-code}; is memory short?" if code < 0 else f"ended with {code}"
        )
        return DataError(f"{path}: the process that tokenises it {how}")


def array_layout(report: DataReport) -> list[tuple[int, Any]]:
    """Size and dtype of the arrays that `TrainingData` is made of, in their order."""
    tokens, sequences = report.tokens, report.sequences
    return [
        (tokens, np.int32),  # token ids
        (tokens, np.bool_),  # supervised
        (sequences + 1, np.int64),  # offsets
        (sequences, np.int64),  # rows
    ]
