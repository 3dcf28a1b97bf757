"""`peft`: which adapter is trained, in the words of PEFT's LoraConfig."""

from __future__ import annotations

import math
from typing import Any, Literal

from pydantic import Field, field_validator

from vllm_flexft.config.base import FilePath, Section

# The order in which a decoder layer runs them.
LINEAR_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class PeftConfig(Section):
    """One LoRA adapter on any of the seven linears of a decoder layer."""

    peft_type: Literal["lora"] = Field("lora", description="lora")
    r: int = Field(8, ge=1, le=512, description="an integer, 1 to 512")
    lora_alpha: int | float = Field(16, gt=0, description="a number > 0")
    target_modules: Literal["all-linear"] | tuple[str, ...] = Field(
        "all-linear", description=f"all-linear, or a list out of {', '.join(LINEAR_MODULES)}"
    )
    layers_to_transform: tuple[int, ...] | None = Field(
        None, description="null (every layer), a layer index, or a list of them, counted from 0"
    )
    use_rslora: bool = Field(False, description="true or false")
    init_adapter: FilePath | None = Field(
        None, description="null, or the folder of a PEFT adapter to start from"
    )

    @property
    def target_module_names(self) -> tuple[str, ...]:
        """The targeted linears, `all-linear` written out, in the order a layer runs them."""
        return LINEAR_MODULES if self.target_modules == "all-linear" else self.target_modules

    @property
    def scaling(self) -> float:
        """What B·A·x is multiplied by: alpha/r, with rsLoRA alpha/sqrt(r) (arXiv 2312.03732)."""
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)

    @field_validator("peft_type", mode="before")
    @classmethod
    def _accept_upper_case(cls, value: Any) -> Any:
        return value.lower() if isinstance(value, str) else value  # PEFT's own files say "LORA"

    @field_validator("lora_alpha")
    @classmethod
    def _whole_number_as_int(cls, value: float) -> int | float:
        return int(value) if value == int(value) else value

    @field_validator("target_modules", mode="before")
    @classmethod
    def _canonical_targets(cls, value: Any) -> Any:
        """Order and repetition of the list mean nothing, so they must not change the hash."""
        if value == "all-linear" or not isinstance(value, list | tuple | set | frozenset):
            return value
        unknown = [repr(name) for name in value if name not in LINEAR_MODULES]
        if unknown or not value:
            what = "the list is empty"
            if unknown:
                what = ", ".join(unknown) + (" are no targets" if unknown[1:] else " is no target")
            raise ValueError(f"{what}; expected all-linear, or some of {', '.join(LINEAR_MODULES)}")
        return tuple(name for name in LINEAR_MODULES if name in value)

    @field_validator("layers_to_transform", mode="before")
    @classmethod
    def _canonical_layers(cls, value: Any) -> Any:
        layers = [value] if isinstance(value, int) else value
        if not isinstance(layers, list | tuple | set | frozenset):
            return value
        if not layers or any(type(i) is not int or i < 0 for i in layers):
            raise ValueError("expected null, a layer index >= 0, or a non-empty list of them")
        return tuple(sorted(set(layers)))
