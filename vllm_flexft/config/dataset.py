"""`dataset` and `validation`: where rows come from and how they become tokens."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from vllm_flexft.config.base import Section

DatasetFormat = Literal["auto", "messages", "sharegpt", "alpaca", "prompt_completion", "text"]

DEFAULT_MAX_LENGTH = 1024  # TRL's SFTConfig.max_length

# Columns that the formats read; the left-hand side of `columns`.
COLUMN_NAMES = (
    "messages",
    "conversations",
    "prompt",
    "completion",
    "text",
    "instruction",
    "input",
    "output",
    "history",
    "system",
    "tools",
)


class DatasetConfig(Section):
    """The training rows. See `vllm_flexft.data.formats` for what each format means."""

    path: str = Field(
        min_length=1, description="the path of a .jsonl, .json, .csv or .parquet file"
    )
    format: DatasetFormat = Field(
        "auto", description="one of auto, messages, sharegpt, alpaca, prompt_completion, text"
    )
    columns: dict[str, str] = Field(
        default_factory=dict,
        description="a mapping from our column to the file's, such as {prompt: question}; ours "
        f"are {', '.join(COLUMN_NAMES)}",
    )
    max_length: int = Field(
        DEFAULT_MAX_LENGTH, ge=2, description="an integer >= 2, in tokens a sequence"
    )
    overlong: Literal["truncate", "drop", "error"] = Field(
        "truncate", description="one of truncate, drop, error"
    )
    completion_only_loss: bool = Field(True, description="true or false")
    shuffle: bool = Field(True, description="true or false")

    @model_validator(mode="before")
    @classmethod
    def _accept_trl_names(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        data = dict(data)
        text_field = data.get("dataset_text_field")
        if isinstance(text_field, str) and text_field:
            columns = data.get("columns") or {}
            # A wrong `columns` is left for its own field's error.
            if isinstance(columns, dict):
                if columns.get("text", text_field) != text_field:
                    raise ValueError(
                        f"dataset_text_field: got {text_field!r}, columns.text is "
                        f"{columns['text']!r}; give one of them"
                    )
                del data["dataset_text_field"]
                # TRL's default name "text" needs no renaming.
                if text_field != "text":
                    data["columns"] = {**columns, "text": text_field}
        if "assistant_only_loss" in data:
            value = data.pop("assistant_only_loss")
            if data.setdefault("completion_only_loss", value) is not value:
                raise ValueError(
                    f"assistant_only_loss: got {value!r}, completion_only_loss is "
                    f"{data['completion_only_loss']!r}; give one of them"
                )
        return data

    @field_validator("format", mode="before")
    @classmethod
    def _refuse_preference(cls, value: Any) -> Any:
        if value == "preference":
            raise ValueError(
                "preference pairs are not supported yet; train on the chosen answers with format "
                "prompt_completion, or columns {prompt: prompt, completion: chosen}"
            )
        return value

    @field_validator("columns", mode="before")
    @classmethod
    def _check_columns(cls, value: Any) -> Any:
        if value is None:
            return {}
        if isinstance(value, dict):
            for ours in value:
                if ours not in COLUMN_NAMES:
                    raise ValueError(
                        f"{ours!r} is no column of ours; expected {', '.join(COLUMN_NAMES)} on "
                        "the left-hand side, the file's column on the right"
                    )
        return value


class ValidationConfig(DatasetConfig):
    """Rows that are only evaluated. A key left out takes the dataset's value."""

    every_steps: int = Field(50, ge=1, description="an integer >= 1, in optimizer steps")
