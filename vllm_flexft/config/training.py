"""`training`: steps, optimizer and learning rate, in the words of TrainingArguments."""

from __future__ import annotations

import math
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from vllm_flexft.config.base import Section

# transformers' default, for a config that names only gradient_accumulation_steps.
_PER_DEVICE_TRAIN_BATCH_SIZE = 8


class TrainingConfig(Section):
    """How long and how fast to train. A step is an optimizer step throughout."""

    num_train_epochs: float = Field(3.0, gt=0, description="a number > 0")
    max_steps: int = Field(-1, ge=-1, description="-1 (train by epochs), or an integer > 0")
    train_batch_size: int = Field(8, ge=1, description="an integer >= 1, sequences a step")
    optim: Literal["adamw_torch", "sgd"] = Field(
        "adamw_torch", description="one of adamw_torch, sgd"
    )
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="a number in [0, 1)")
    adam_beta2: float = Field(0.999, ge=0, lt=1, description="a number in [0, 1)")
    adam_epsilon: float = Field(1e-8, gt=0, description="a number > 0")
    learning_rate: float = Field(2e-4, gt=0, description="a number > 0")
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup"] = Field(
        "linear", description="one of linear, cosine, constant, constant_with_warmup"
    )
    warmup_ratio: float = Field(
        0.0, ge=0, le=1, description="a number in [0, 1], the part of all steps"
    )
    warmup_steps: int = Field(
        0, ge=0, description="an integer >= 0 (for a part of all steps use warmup_ratio)"
    )
    weight_decay: float = Field(0.0, ge=0, description="a number >= 0")
    max_grad_norm: float = Field(1.0, ge=0, description="a number >= 0, where 0 is no clipping")
    seed: int = Field(42, ge=0, lt=2**32, description="an integer, 0 to 2**32 - 1")
    save_steps: int = Field(100, ge=1, description="an integer >= 1")
    save_total_limit: int | None = Field(
        2, ge=1, description="an integer >= 1, or null (keep every checkpoint)"
    )
    early_stopping_patience: int | None = Field(
        None, ge=1, description="null, or an integer >= 1, in validations without a better loss"
    )

    def warmup_steps_of(self, total_steps: int) -> int:
        """Optimizer steps of linear warm-up, as TrainingArguments.get_warmup_steps counts them."""
        return self.warmup_steps or math.ceil(total_steps * self.warmup_ratio)

    def learning_rate_at(self, step: int, total_steps: int) -> float:
        """Learning rate of optimizer step `step`, counted from 0, out of `total_steps`.

        Equal to transformers.get_scheduler's LambdaLR after `step` calls of `step()`
        (transformers/optimization.py). As there, `constant` knows no warm-up.
        """
        return self.learning_rate * self._schedule(step, total_steps)

    def _schedule(self, step: int, total_steps: int) -> float:
        if self.lr_scheduler_type == "constant":
            return 1.0
        warmup = self.warmup_steps_of(total_steps)
        if step < warmup:
            return step / warmup
        if self.lr_scheduler_type == "constant_with_warmup":
            return 1.0
        decay_steps = max(1, total_steps - warmup)
        if self.lr_scheduler_type == "cosine":
            progress = (step - warmup) / decay_steps
            return max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress)))
        return max(0.0, (total_steps - step) / decay_steps)

    @model_validator(mode="before")
    @classmethod
    def _accept_trainer_batch_size(cls, data: Any) -> Any:
        """per_device_train_batch_size x gradient_accumulation_steps: one engine, one device."""
        names = ("per_device_train_batch_size", "gradient_accumulation_steps")
        if not isinstance(data, dict) or not any(name in data for name in names):
            return data
        data = dict(data)
        per_device = data.pop(names[0], _PER_DEVICE_TRAIN_BATCH_SIZE)
        accumulation = data.pop(names[1], 1)
        for name, value in zip(names, (per_device, accumulation), strict=True):
            if type(value) is not int or value < 1:
                raise ValueError(f"{name}: got {value!r}, expected an integer >= 1")
        product = per_device * accumulation
        if data.setdefault("train_batch_size", product) != product:
            raise ValueError(
                f"train_batch_size: got {data['train_batch_size']!r}, but {names[0]} x {names[1]} "
                f"is {per_device} x {accumulation} = {product}; give one of them"
            )
        return data

    @field_validator("max_steps")
    @classmethod
    def _not_zero(cls, value: int) -> int:
        if value == 0:
            raise ValueError("expected -1 (train by epochs), or an integer > 0")
        return value

    @model_validator(mode="after")
    def _check_together(self) -> TrainingConfig:
        if self.warmup_ratio and self.warmup_steps:
            raise ValueError(
                f"warmup_ratio: got {self.warmup_ratio}, and warmup_steps is {self.warmup_steps}; "
                "give one of them"
            )
        return self
