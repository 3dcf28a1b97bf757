"""A whole finetuning run of transformers + peft: the reference for ours.

torch.optim, transformers' schedules and torch's clipping; only the model and tokenisation come
from `peft_reference`.

It can run in double precision, and then stands for the exact result. AdamW's first update of an
entry is lr * g / (|g| + eps): where g is rounding noise (B's gradients that happen to vanish), it
goes either way, and a row of A follows. Two fp32 loops of transformers, or an fp32 and an fp64 one,
so end up to 1e-2 apart in single entries, though their losses agree to 2e-5.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from harness.peft_reference import PeftTrainer


class DoublePeftTrainer(PeftTrainer):
    """Starts from a saved adapter; weights, activations, loss and optimizer in fp64.

    Llama's norms and rotary tables stay in fp32 there, as transformers writes them.
    """

    def __init__(self, model_dir: Path, adapter_dir: Path) -> None:
        super().__init__(model_dir, {}, adapter_dir=adapter_dir)
        self.model.double()

    def loss_sum(self, ids: Sequence[int], labels: Sequence[int]) -> torch.Tensor:
        logits = self.model(input_ids=torch.tensor([list(ids)])).logits[0, :-1]
        return torch.nn.functional.cross_entropy(
            logits, torch.tensor(list(labels[1:])), ignore_index=-100, reduction="sum"
        )


Row = tuple[Sequence[int], Sequence[int]]  # token ids, labels


@dataclass
class LoopResult:
    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    learning_rates: list[float] = field(default_factory=list)
    evals: dict[int, tuple[float, float]] = field(default_factory=dict)  # step -> loss, accuracy
    adapter: dict[str, torch.Tensor] = field(default_factory=dict)


def train_loop(
    trainer: PeftTrainer,
    batches: Sequence[Sequence[Row]],
    *,
    optim: str = "adamw_torch",
    learning_rate: float,
    lr_scheduler_type: str = "linear",
    warmup_steps: int = 0,
    weight_decay: float = 0.0,
    max_grad_norm: float = 1.0,
    total_steps: int | None = None,
    valid: Sequence[Row] = (),
    every_steps: int = 1,
) -> LoopResult:
    """One optimizer step a batch. `total_steps`: what the schedule decays over."""
    from transformers import get_scheduler

    parameters = list(trainer.parameters().values())
    make: Mapping[str, Any] = {"adamw_torch": torch.optim.AdamW, "sgd": torch.optim.SGD}
    optimizer = make[optim](parameters, lr=learning_rate, weight_decay=weight_decay)
    schedule = get_scheduler(
        lr_scheduler_type, optimizer, warmup_steps, total_steps or len(batches)
    )
    result = LoopResult()
    for step, rows in enumerate(batches, start=1):
        optimizer.zero_grad()
        result.losses.append(float(trainer.step_loss(rows)))
        bound = max_grad_norm if max_grad_norm > 0 else float("inf")
        result.grad_norms.append(float(torch.nn.utils.clip_grad_norm_(parameters, bound)))
        result.learning_rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
        if valid and (step % every_steps == 0 or step == len(batches)):
            result.evals[step] = evaluate(trainer, valid)
    result.adapter = {name: p.detach().clone() for name, p in trainer.parameters().items()}
    return result


@torch.no_grad()
def evaluate(trainer: PeftTrainer, rows: Sequence[Row]) -> tuple[float, float]:
    """Mean loss and share of right top-1 predictions over the supervised tokens."""
    loss, right, count = 0.0, 0, 0
    for ids, labels in rows:
        target = torch.tensor(list(labels[1:]))
        mask = target != -100
        logits = trainer.model(input_ids=torch.tensor([list(ids)])).logits[0, :-1][mask]
        loss += float(torch.nn.functional.cross_entropy(logits, target[mask], reduction="sum"))
        right += int((logits.argmax(-1) == target[mask]).sum())
        count += int(mask.sum())
    return loss / count, right / count
