"""The independent reference: transformers + peft autograd, written from their documentation.

Shares no code with the package: its own tokenisation, masks, loop.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch


def tokenise(
    tokenizer: Any,
    prompt: str,
    completion: str,
    max_length: int,
    completion_only_loss: bool = True,
) -> tuple[list, list]:
    """TRL's prompt-completion: one text, EOS after the completion, loss on the completion."""
    text = prompt + completion
    encoded = tokenizer(text, return_offsets_mapping=True)
    ids = list(encoded["input_ids"])
    labels = [
        token if end > len(prompt) or not completion_only_loss else -100
        for token, (_, end) in zip(ids, encoded["offset_mapping"], strict=True)
    ]
    if ids[-1] != tokenizer.eos_token_id:
        ids.append(tokenizer.eos_token_id)
        labels.append(tokenizer.eos_token_id)
    return ids[:max_length], labels[:max_length]


def write_rows(path: Path, rows: Sequence[tuple[str, str]]) -> Path:
    path.write_text("".join(json.dumps({"prompt": p, "completion": c}) + "\n" for p, c in rows))
    return path


class PeftTrainer:
    """A LoRA adapter of peft on a transformers model, trained row by row."""

    def __init__(
        self,
        model_dir: Path,
        peft: Mapping[str, Any],
        *,
        dtype: torch.dtype = torch.float32,
        adapter_dir: Path | None = None,
    ) -> None:
        from peft import LoraConfig, PeftModel, get_peft_model
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(model_dir)
        base = AutoModelForCausalLM.from_pretrained(
            model_dir, dtype=dtype, attn_implementation="eager"
        )
        if adapter_dir is not None:
            self.model = PeftModel.from_pretrained(base, adapter_dir, is_trainable=True)
        else:
            self.model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **peft))
        self.model.train()
        self.last_loss = float("nan")  # of the rows that `gradients` saw

    def parameters(self) -> dict[str, torch.nn.Parameter]:
        return {
            name.replace(".default", ""): parameter
            for name, parameter in self.model.named_parameters()
            if parameter.requires_grad
        }

    def randomise(self, seed: int, scale: float = 0.05) -> None:
        """Both matrices away from zero, so that every gradient is."""
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.parameters().values():
            with torch.no_grad():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)

    def save(self, folder: Path) -> Path:
        self.model.save_pretrained(folder)
        return folder

    def loss_sum(self, ids: Sequence[int], labels: Sequence[int]) -> torch.Tensor:
        """Sum of the next-token losses of one sequence, fp32."""
        logits = self.model(input_ids=torch.tensor([list(ids)])).logits[0, :-1].float()
        target = torch.tensor(list(labels[1:]))
        return torch.nn.functional.cross_entropy(logits, target, ignore_index=-100, reduction="sum")

    def step_loss(self, rows: Sequence[tuple[Sequence[int], Sequence[int]]]) -> torch.Tensor:
        """The mean over the supervised tokens of all rows; backward is run row by row."""
        count = sum(sum(label != -100 for label in labels[1:]) for _, labels in rows)
        total = torch.zeros(())
        for ids, labels in rows:
            loss = self.loss_sum(ids, labels) / count
            loss.backward()
            total += loss.detach()
        return total

    def gradients(
        self, rows: Sequence[tuple[Sequence[int], Sequence[int]]]
    ) -> dict[str, torch.Tensor]:
        self.model.zero_grad()
        self.last_loss = float(self.step_loss(rows))
        return {name: p.grad.detach().clone() for name, p in self.parameters().items()}
