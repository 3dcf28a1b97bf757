"""What a run says on the terminal: one line per optimizer step, and a summary at the end."""

from dataclasses import dataclass
from pathlib import Path


def format_step(
    *,
    name: str,
    step: int,
    total_steps: int,
    loss: float,
    learning_rate: float,
    grad_norm: float,
    tokens_per_second: float,
    eta_s: float,
) -> str:
    """`[gsm8k] step 12/300  loss 1.234  lr 1.9e-04  grad_norm 0.81  312 tok/s  eta 4m10s`"""
    width = len(str(total_steps))
    return (
        f"[{name}] step {step:>{width}}/{total_steps}  loss {loss:.3f}  lr {learning_rate:.1e}  "
        f"grad_norm {grad_norm:.2f}  {tokens_per_second:.0f} tok/s  eta {format_duration(eta_s)}"
    )


def format_validation(
    *, name: str, step: int, eval_loss: float, eval_mean_token_accuracy: float
) -> str:
    """`[gsm8k] step 50  eval_loss 0.987  eval_mean_token_accuracy 0.71`"""
    return (
        f"[{name}] step {step}  eval_loss {eval_loss:.3f}  "
        f"eval_mean_token_accuracy {eval_mean_token_accuracy:.2f}"
    )


def format_duration(seconds: float) -> str:
    """The two largest units: `45s`, `4m10s`, `1h02m`, `2d03h`."""
    total = max(0, round(seconds))
    if total < 60:
        return f"{total}s"
    if total < 3600:
        return f"{total // 60}m{total % 60:02d}s"
    minutes = round(total / 60)
    if minutes < 24 * 60:
        return f"{minutes // 60}h{minutes % 60:02d}m"
    hours = round(total / 3600)
    return f"{hours // 24}d{hours % 24:02d}h"


def eta_s(*, step: int, total_steps: int, steps_timed: int, elapsed_s: float) -> float:
    """Seconds left, at the mean pace of the `steps_timed` steps that took `elapsed_s`.

    A resumed run times only its own steps.
    """
    assert steps_timed > 0
    return (total_steps - step) * elapsed_s / steps_timed


@dataclass(frozen=True)
class RunSummary:
    """A finished run in numbers. Tokens and seconds are those of the whole run."""

    name: str
    served_as: str
    adapter_dir: Path
    steps: int
    first_loss: float
    last_loss: float
    num_input_tokens: int
    num_tokens: int  # supervised
    wall_s: float


def format_summary(run: RunSummary) -> str:
    """Several lines, no trailing newline."""
    pace = run.num_input_tokens / run.wall_s if run.wall_s > 0 else 0.0
    return "\n".join(
        [
            f"[{run.name}] done: {run.steps} steps in {format_duration(run.wall_s)}",
            f"  loss     {run.first_loss:.3f} -> {run.last_loss:.3f}",
            f"  tokens   {run.num_input_tokens:,} ({run.num_tokens:,} supervised), "
            f"{pace:.0f} tok/s",
            f"  adapter  {run.adapter_dir}",
            f'  served   as model "{run.served_as}"',
        ]
    )
