"""metrics.jsonl: a line per optimizer step and per validation, exact across resumes."""

import json
import logging
import os
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from vllm_flexft.obs.backends import Backend, open_backends
from vllm_flexft.obs.jsonsafe import flag_non_finite

logger = logging.getLogger("vllm.flexft")

METRICS_FILE = "metrics.jsonl"


class MetricsWriter:
    """Appends to `output_dir/metrics.jsonl`, one flushed line at a time.

    A resume first drops the lines of steps after `resume_step`: they belong to work that was
    lost and will be done again. It adds the lines of `log_history`, the checkpoint's own record,
    that a crash kept from being written. NaN and infinity are written as null and named under
    "non_finite". A failing backend is switched off with a warning; it never stops a run.
    Raises ValueError if a backend of `report_to` is not installed, OSError if the file cannot
    be written.
    """

    def __init__(
        self,
        output_dir: Path,
        resume_step: int = 0,
        *,
        report_to: Collection[str] = (),
        run_name: str = "",
        log_history: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        self.path = Path(output_dir) / METRICS_FILE
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._backends: list[Backend] = open_backends(
            report_to, Path(output_dir), run_name, resume_step
        )
        restore(self.path, resume_step, log_history)
        self._file = self.path.open("a", encoding="utf-8", buffering=1)

    def log_step(
        self,
        *,
        step: int,
        epoch: float,
        loss: float,
        learning_rate: float,
        grad_norm: float,
        num_tokens: int,
        num_input_tokens: int,
        tokens_per_second: float,
    ) -> dict[str, Any]:
        """One optimizer step; the line as written.

        Args:
            epoch: fraction of epochs done after the step.
            loss: mean over the step's supervised tokens, in nats.
            grad_norm: before clipping.
            num_tokens: supervised tokens so far.
            num_input_tokens: tokens so far, without padding.
            tokens_per_second: input tokens of this step per second of wall time.
        """
        return self._write(
            {
                "step": step,
                "epoch": epoch,
                "loss": loss,
                "learning_rate": learning_rate,
                "grad_norm": grad_norm,
                "num_tokens": num_tokens,
                "num_input_tokens": num_input_tokens,
                "tokens_per_second": tokens_per_second,
                "time": time.time(),
            }
        )

    def log_validation(
        self, *, step: int, eval_loss: float, eval_mean_token_accuracy: float
    ) -> dict[str, Any]:
        """One pass over the validation set after optimizer step `step`; the line as written."""
        return self._write(
            {
                "step": step,
                "eval_loss": eval_loss,
                "eval_mean_token_accuracy": eval_mean_token_accuracy,
                "time": time.time(),
            }
        )

    def sync(self) -> None:
        """Make the lines so far durable. A checkpoint repeats only recent ones."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()
        for backend in self._backends:
            backend.close()

    def _write(self, line: Mapping[str, Any]) -> dict[str, Any]:
        flagged = flag_non_finite(line)
        self._file.write(json.dumps(flagged, allow_nan=False) + "\n")
        for backend in list(self._backends):
            try:
                backend.log(line["step"], line)
            except Exception:
                logger.exception("%s is switched off for this run", type(backend).__name__)
                self._backends.remove(backend)
        return flagged


def restore(path: Path, step: int, log_history: Sequence[Mapping[str, Any]] = ()) -> None:
    """Keep only whole lines of steps <= `step` (none for step 0: a fresh start), atomically.

    A last line torn by a crash is dropped. So is any other line that cannot be read. Lines of
    `log_history` up to `step` that are missing are added in their place. A file that needs none
    of this is left untouched.
    """
    try:
        lines = path.read_bytes().splitlines(keepends=True)
    except FileNotFoundError:
        lines = []
    kept = [line for line in lines if _belongs(line, step)]
    present = {_place(json.loads(line)) for line in kept}
    missing = [line for line in log_history if line["step"] <= step and _place(line) not in present]
    if missing:
        kept += [_encode(line) for line in missing]
        kept.sort(key=lambda line: _place(json.loads(line)))
    if kept == lines:
        return
    aside = path.with_name(f".{path.name}.tmp")
    with aside.open("wb") as file:
        file.writelines(kept)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Every whole line, in order; a torn last one is left out. For plots and dashboards."""
    try:
        lines = path.read_bytes().splitlines(keepends=True)
    except FileNotFoundError:
        return []
    return [parsed for line in lines if (parsed := _parse(line)) is not None]


def _place(line: Mapping[str, Any]) -> tuple[int, bool]:
    """The order of lines: by step, its evaluation after it."""
    return line["step"], "eval_loss" in line


def _encode(line: Mapping[str, Any]) -> bytes:
    return json.dumps(flag_non_finite(line), allow_nan=False).encode() + b"\n"


def _belongs(line: bytes, step: int) -> bool:
    parsed = _parse(line)
    # At step 0 nothing was trained: an evaluation of the untouched model will be done again.
    return parsed is not None and 0 < step >= parsed["step"]


def _parse(line: bytes) -> dict[str, Any] | None:
    if not line.endswith(b"\n"):
        return None
    try:
        parsed = json.loads(line)
    except ValueError:
        return None
    return parsed if isinstance(parsed, dict) and isinstance(parsed.get("step"), int) else None
