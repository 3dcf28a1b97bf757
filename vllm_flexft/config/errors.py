"""One error type for job files, and the words of its messages."""

from __future__ import annotations

import difflib
import typing
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from vllm_flexft.config.foreign import FOREIGN_KEYS, NO_EFFECT_VALUES


class JobError(ValueError):
    """A job, or the server's options, that cannot be accepted; one line for every mistake."""


def explain(exc: ValidationError, model: type[BaseModel], prefix: str = "") -> str:
    """One line per mistake: the key's path, the value, and what would be accepted.

    Args:
        model: the model whose validation raised `exc`.
        prefix: what the paths begin with, where `model` is not the root of what the user wrote.
    """
    lines: dict[str, str] = {}
    # An unknown key first: it is often what the other mistakes come from.
    errors = exc.errors(include_url=False)
    for error in sorted(errors, key=lambda e: e["type"] != "extra_forbidden"):
        keys, section, field = _locate(model, error["loc"])
        path = ".".join([prefix, *keys] if prefix else keys)
        # A union reports a line for every member that did not match: the first one is enough.
        lines.setdefault(path, _line(error, path, keys, section, field, model))
    return "\n".join(lines.values())


def _line(
    error: Any,
    path: str,
    keys: list[str],
    section: type[BaseModel],
    field: FieldInfo | None,
    root: type[BaseModel],
) -> str:
    kind, value = error["type"], error["input"]
    if kind == "extra_forbidden":
        return _unknown_key(path, keys[-1], value, section, root)
    if kind == "invalid_key":
        return f"{path}: keys are strings, got {shown(value)}"
    if kind == "missing":
        return f"{path}: missing, expected {field.description if field else 'a value'}"
    if kind == "value_error":
        message = str(error["ctx"]["error"])
        if field is None or _section_of(field) is not None:
            # Raised by a check over several keys of a section: the message begins with the key.
            return f"{path}.{message}" if path else message
        return f"{path}: got {shown(value)}: {message}"
    expected = field.description if field else "a mapping"
    return f"{path}: got {shown(value)}, expected {expected}"


def _unknown_key(
    path: str, key: str, value: Any, section: type[BaseModel], root: type[BaseModel]
) -> str:
    parent = path.removesuffix(key)
    head = f"{path}: unknown key (value {shown(value)}); "
    elsewhere = [full for full in _paths(root) if full.split(".")[-1] == key]
    if elsewhere:
        return f"{head}it belongs at {' or '.join(elsewhere)}"
    if key in NO_EFFECT_VALUES:
        return f"{path}: got {shown(value)}: {FOREIGN_KEYS[key]}"
    if key in FOREIGN_KEYS:
        return head + FOREIGN_KEYS[key]
    spelling = key.lower().replace("-", "_")
    close = difflib.get_close_matches(spelling, list(section.model_fields), n=1)
    if close:
        return f"{head}did you mean {parent}{close[0]}?"
    return f"{head}accepted here: {', '.join(section.model_fields)}"


def _locate(
    model: type[BaseModel], loc: tuple[int | str, ...]
) -> tuple[list[str], type[BaseModel], FieldInfo | None]:
    """The keys down to a field, its section and the field; the field is None for unknown keys.

    Pydantic appends indices and the names of union members to `loc`: they are cut off.
    """
    keys: list[str] = []
    section, field = model, None
    for part in loc:
        keys.append(str(part))
        field = section.model_fields.get(str(part))
        inner = _section_of(field) if field else None
        if inner is None:
            break
        section = inner
    return keys, section, field


def _section_of(field: FieldInfo) -> type[BaseModel] | None:
    """The model that a field holds, for `Model` and `Model | None`."""
    for candidate in (field.annotation, *typing.get_args(field.annotation)):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None


def _paths(model: type[BaseModel], parent: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield parent + name
        inner = _section_of(field)
        if inner is not None:
            yield from _paths(inner, f"{parent}{name}.")


def shown(value: Any, limit: int = 80) -> str:
    """`value` as Python writes it, cut to `limit` characters."""
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."
