"""What every section of the job has in common: frozen, strictly typed, no unknown keys.

Each field's `description` says which values it accepts; error messages quote it, so the schema
and its errors cannot disagree.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, model_validator

from vllm_flexft.config.foreign import NO_EFFECT_VALUES


class Section(BaseModel):
    """Base of all sections. `strict`: "8" is no integer, and `true` is no number."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, validate_default=False
    )

    @model_validator(mode="before")
    @classmethod
    def _drop_keys_without_effect(cls, data: Any) -> Any:
        """Let `packing: false` or `lora_dropout: 0.0` of a pasted TRL or PEFT config pass.

        They ask for what happens anyway. Any other value of such a key stays and is refused.
        """
        if not isinstance(data, dict):
            return data
        return {
            key: value
            for key, value in data.items()
            if key in cls.model_fields or value not in NO_EFFECT_VALUES.get(key, ())
        }


def _as_path(value: Any) -> Any:
    if isinstance(value, str) and value:
        return Path(value).expanduser()
    return value


FilePath = Annotated[Path, BeforeValidator(_as_path)]


def absolute(path: Path, base_dir: Path) -> Path:
    """`path` made absolute against `base_dir`, symbolic links left as they are."""
    return Path.cwd() / base_dir / path
