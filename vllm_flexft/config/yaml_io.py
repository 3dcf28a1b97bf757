"""YAML as jobs are written: YAML 1.2 floats, no duplicate keys, errors with their line."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from vllm_flexft.config.errors import JobError

# PyYAML follows YAML 1.1, where `2e-4` and `1.0e4` are strings.
_EXPONENT_FLOAT = re.compile(r"^[-+]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)[eE][-+]?[0-9]+\Z")


class _Loader(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            key = key_node.value
            if isinstance(key, str) and key != "<<":
                if key in seen:
                    raise yaml.MarkedYAMLError(
                        problem=f"duplicate key {key!r}", problem_mark=key_node.start_mark
                    )
                seen.add(key)
        return super().construct_mapping(node, deep=deep)


class _Dumper(yaml.SafeDumper):
    """Quotes a string that `_Loader` would read as a float."""


for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT_FLOAT, list("-+.0123456789"))


def load(path: Path) -> Any:
    """The document in a YAML file. Raises `JobError` if it cannot be read."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise JobError("no such file; expected a job in YAML") from None
    except OSError as exc:
        raise JobError(f"cannot be read: {exc.strerror}") from None
    except UnicodeDecodeError as exc:
        raise JobError(f"not UTF-8 at byte {exc.start}; expected a job in YAML") from None
    try:
        document = yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as exc:
        mark = exc.problem_mark or exc.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise JobError(f"{where}not YAML: {exc.problem or exc.context}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as exc:
        # ValueError: a timestamp such as 2024-99-99.
        raise JobError(f"not YAML: {exc}".split("\n")[0]) from None
    if document is None:
        raise JobError("the file is empty; expected a mapping with at least name and dataset")
    return document


def dump(document: dict[str, Any]) -> str:
    """YAML text that `load` reads back as an equal document."""
    return yaml.dump(document, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
