"""Conversations of a dataset, checked turn by turn."""

from __future__ import annotations

import json
from typing import Any

from vllm_flexft.data.files import DataError

_ROLES = {
    "system": "system",
    "developer": "developer",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "tool": "tool",
    "observation": "tool",
}


def conversation(
    turns: Any, column: str, where: str
) -> tuple[list[dict[str, Any]], tuple[bool, ...]]:
    """Messages as a chat template wants them, and for each whether it is a target.

    Turns are {role, content} or ShareGPT's {from, value}, as a list or, in a CSV, as JSON.

    Raises:
        DataError: with the place and the turn's number.
    """
    if isinstance(turns, str):  # a CSV cell
        turns = _parsed_json(turns, column, where)
    if not isinstance(turns, list) or not turns:
        raise DataError(
            f"{where}: {column}: expected a non-empty list of messages, got {turns!r:.80}"
        )
    messages, supervised = [], []
    for number, turn in enumerate(turns):
        at = f"{where}: {column}[{number}]"
        message, is_target = _turn(turn, at)
        messages.append(message)
        supervised.append(is_target)
    return messages, tuple(supervised)


def _turn(turn: Any, at: str) -> tuple[dict[str, Any], bool]:
    """A message as the chat template wants it, and whether it is a target."""
    if not isinstance(turn, dict):
        raise DataError(f"{at}: expected an object with role and content, got {turn!r:.80}")
    if "from" in turn and "role" not in turn:
        turn = {"role": turn["from"], "content": turn.get("value")}
    role = turn.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        hint = "; write it as an assistant message with tool_calls" * (role == "function_call")
        raise DataError(f"{at}: role {role!r} is none of {', '.join(_ROLES)}{hint}")
    message = {**turn, "role": _ROLES[role], "content": _content(turn, at)}
    if turn.get("tool_calls"):
        message["tool_calls"] = _tool_calls(turn["tool_calls"], at)
    # OpenAI's fine-tuning format: an assistant message of weight 0 is context only.
    weight = message.pop("weight", None)
    if weight not in (None, 0, 1):
        raise DataError(f"{at}: weight {weight!r}: expected 0 or 1")
    return message, message["role"] == "assistant" and weight != 0


def _content(turn: dict[str, Any], at: str) -> str | None:
    content = turn.get("content")
    if content is None and turn.get("tool_calls"):
        return None
    if isinstance(content, list):
        texts = [part.get("text") if isinstance(part, dict) else part for part in content]
        if not all(isinstance(text, str) for text in texts):
            raise DataError(f"{at}: content has a part that is no text, got {content!r:.80}")
        return "".join(text for text in texts if text)
    if not isinstance(content, str):
        raise DataError(f"{at}: content: expected a string, got {content!r:.80}")
    return content


def _tool_calls(calls: Any, at: str) -> Any:
    """OpenAI writes a call's arguments as a JSON string; templates, as when serving, want them
    parsed."""
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise DataError(f"{at}: tool_calls: expected a list of objects, got {calls!r:.80}")
    parsed = []
    for call in calls:
        function = call.get("function")
        if isinstance(function, dict) and isinstance(function.get("arguments"), str):
            arguments = _parsed_json(function["arguments"] or "{}", "tool_calls", at)
            call = {**call, "function": {**function, "arguments": arguments}}
        parsed.append(call)
    return parsed


def tools_of(values: dict[str, Any], where: str) -> list[Any] | None:
    """The `tools` column: JSON schemas for the chat template, or None."""
    tools = values.get("tools")
    if isinstance(tools, str) and tools:
        tools = _parsed_json(tools, "tools", where)
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise DataError(f"{where}: tools: expected a list of JSON schemas, got {tools!r:.80}")
    return tools


def _parsed_json(text: str, column: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as exc:
        raise DataError(f"{where}: {column}: not JSON: {exc}") from None
