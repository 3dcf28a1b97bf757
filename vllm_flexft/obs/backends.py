"""Where metrics may go besides metrics.jsonl: TensorBoard and Weights & Biases.

Both are imported only when a job asks for them.
"""

import uuid
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Protocol

REPORTERS = ("tensorboard", "wandb")


class Backend(Protocol):
    def log(self, step: int, values: Mapping[str, Any]) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files in `output_dir/runs`. NaN is kept: TensorBoard draws it as a triangle."""

    def __init__(self, output_dir: Path, resume_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # purge_step hides what an interrupted run logged at the steps that are done again.
        self._writer = SummaryWriter(str(output_dir / "runs"), purge_step=resume_step + 1)

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        for key, value in values.items():
            if key not in ("step", "time"):
                group = "eval" if key.startswith("eval_") else "train"
                self._writer.add_scalar(f"{group}/{key}", value, step)

    def close(self) -> None:
        self._writer.close()


class WandB:
    """One run per job; a resumed job goes on in the same run.

    Project, entity, key and mode come from wandb's own environment variables. "step" is a value
    and the x axis, not wandb's own step, which refuses to go back after a resume.
    """

    def __init__(self, output_dir: Path, run_name: str) -> None:
        import wandb

        run_id_file = output_dir / "wandb_run_id"
        if not run_id_file.exists():
            run_id_file.write_text(uuid.uuid4().hex)
        self._run = wandb.init(
            id=run_id_file.read_text().strip(),
            name=run_name or None,
            dir=str(output_dir),
            resume="allow",
        )
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        self._run.log(dict(values))

    def close(self) -> None:
        self._run.finish()


def open_backends(
    report_to: Collection[str], output_dir: Path, run_name: str, resume_step: int
) -> list[Backend]:
    """Raises ValueError for an unknown reporter, or one that is not installed."""
    backends: list[Backend] = []
    for name in report_to:
        if name not in REPORTERS:
            raise ValueError(f"report_to: {name!r} is none of {', '.join(REPORTERS)}")
        try:
            if name == "tensorboard":
                backends.append(TensorBoard(output_dir, resume_step))
            else:
                backends.append(WandB(output_dir, run_name))
        except ImportError as e:
            raise ValueError(f"report_to: {name} is not installed: pip install {name}") from e
    return backends
