"""Rows of the five formats, normalised to three kinds of example.

    format             columns                                         becomes
    messages           messages [, tools]                              ChatExample
    sharegpt           conversations [, system, tools]                 ChatExample
    alpaca             instruction, output [, input, system, history]  ChatExample (*)
    prompt_completion  prompt, completion; or question, answer         PromptCompletionExample (**)
    text               text                                            TextExample

    (*) without a chat template PromptCompletionExample
    (**) ChatExample where both columns hold lists of messages

`auto` takes the first format in this table whose columns the first row has.

Alpaca rows follow LLaMA-Factory where the model has a chat template: the user says the instruction
and, on the next line, the input. Otherwise they take the Stanford Alpaca prompt, as base models are
usually trained. Prompt and completion are joined as they are, as in TRL: nothing is put between.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from vllm_flexft.config import DatasetConfig
from vllm_flexft.data.files import DataError, SourceRow
from vllm_flexft.data.messages import conversation, tools_of


@dataclass(frozen=True, slots=True)
class TextExample:
    """Plain text, every token a target."""

    text: str


@dataclass(frozen=True, slots=True)
class PromptCompletionExample:
    """Two strings tokenised as one; the completion is the target."""

    prompt: str
    completion: str


@dataclass(frozen=True, slots=True)
class ChatExample:
    """A conversation for the chat template.

    Attributes:
        messages: dicts with `role`, `content` and what else the template may read.
        supervised: for every message, whether it is a target; only the assistant's are.
        tools: JSON schemas for the template, or None.
    """

    messages: list[dict[str, Any]]
    supervised: tuple[bool, ...]
    tools: list[Any] | None = None


Example = TextExample | PromptCompletionExample | ChatExample

# In the order of detection. `alpaca` goes before `text`, since the original Alpaca file carries
# its formatted prompt in a column of that name.
_REQUIRED_COLUMNS: dict[str, tuple[tuple[str, ...], ...]] = {
    "messages": (("messages",),),
    "sharegpt": (("conversations",),),
    "alpaca": (("instruction", "output"),),
    "prompt_completion": (("prompt", "completion"), ("question", "answer")),
    "text": (("text",),),
}

# Stanford Alpaca, train.py PROMPT_DICT.
_ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
_ALPACA_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n### Instruction:\n{instruction}\n\n### Response:"
)


class _NoStringError(Exception):
    """The value of a column, by our name of it."""

    def __init__(self, column: str, value: Any) -> None:
        super().__init__(column, value)
        self.column, self.value = column, value


def normaliser(
    config: DatasetConfig, first: SourceRow, *, has_chat_template: bool
) -> Callable[[SourceRow], Example]:
    """The function that turns this dataset's rows into examples.

    Args:
        first: the first row; with `format: auto`, its columns decide.
        has_chat_template: whether the model's tokenizer has one.

    Raises:
        DataError: no format fits the columns; the returned function raises it for a row that
            lacks a column or holds a wrong value.
    """
    columns = _renamed(first, config.columns).keys()
    chosen = _detect(first, columns) if config.format == "auto" else config.format
    required = _columns_of(chosen, columns, first)
    read = {
        "messages": _messages,
        "sharegpt": _sharegpt,
        "alpaca": _alpaca_chat if has_chat_template else _alpaca_prompt,
        "prompt_completion": _prompt_completion,
        "text": _text,
    }[chosen]

    names = dict(config.columns)  # ours -> the file's
    if required == ("question", "answer"):
        names |= {"prompt": "question", "completion": "answer"}

    def normalise(row: SourceRow) -> Example:
        values = _renamed(row, config.columns)
        missing = [name for name in required if name not in values]
        if missing:
            raise DataError(f"{row.where}: no column {missing[0]!r}; found {_names(values)}")
        if required == ("question", "answer"):
            values = {**values, "prompt": values["question"], "completion": values["answer"]}
        try:
            example = read(values, row.where)
        except _NoStringError as error:
            theirs = names.get(error.column, error.column)
            ours = f" ({error.column})" if theirs != error.column else ""
            raise DataError(
                f"{row.where}: column {theirs!r}{ours}: expected a string, got {error.value!r:.80}"
            ) from None
        if isinstance(example, ChatExample) and not has_chat_template:
            raise DataError(
                f"{row.where}: a conversation, but the model's tokenizer has no chat template; "
                "use prompt and completion as strings, or serve an instruction-tuned model"
            )
        return example

    return normalise


def _renamed(row: SourceRow, columns: dict[str, str]) -> dict[str, Any]:
    if not columns:
        return row.values
    values = dict(row.values)
    for ours, theirs in columns.items():
        if theirs not in row.values:
            raise DataError(
                f"{row.where}: no column {theirs!r}, named in columns.{ours}; "
                f"found {_names(row.values)}"
            )
        values[ours] = row.values[theirs]
    return values


def _detect(row: SourceRow, columns: Any) -> str:
    for name, alternatives in _REQUIRED_COLUMNS.items():
        if any(set(required) <= set(columns) for required in alternatives):
            return name
    if {"chosen", "rejected"} <= set(columns):
        raise DataError(
            f"{row.where}: preference pairs are not supported yet; to train on the chosen answers "
            "set columns: {prompt: prompt, completion: chosen}"
        )
    wanted = "; ".join(
        " or ".join(" + ".join(required) for required in alternatives) + f" ({name})"
        for name, alternatives in _REQUIRED_COLUMNS.items()
    )
    raise DataError(
        f"{row.where}: no known format has these columns: {_names(columns)}; wanted {wanted}; "
        "rename them with columns: {ours: theirs}"
    )


def _columns_of(chosen: str, columns: Any, row: SourceRow) -> tuple[str, ...]:
    alternatives = _REQUIRED_COLUMNS[chosen]
    for required in alternatives:
        if set(required) <= set(columns):
            return required
    wanted = " or ".join(", ".join(required) for required in alternatives)
    raise DataError(
        f"{row.where}: format {chosen} wants the columns {wanted}; found {_names(columns)}; "
        "rename them with columns: {ours: theirs}"
    )


def _names(columns: Any) -> str:
    return ", ".join(map(str, columns)) or "none"


# ---- one reader per format


def _text(values: dict[str, Any], where: str) -> Example:
    return TextExample(_string(values, "text"))


def _prompt_completion(values: dict[str, Any], where: str) -> Example:
    if not isinstance(values["prompt"], list) and not isinstance(values["completion"], list):
        return PromptCompletionExample(_string(values, "prompt"), _string(values, "completion"))
    context, _ = conversation(values["prompt"], "prompt", where)
    answer, supervised = conversation(values["completion"], "completion", where)
    # TRL masks the prompt's assistant turns: only the completion is a target.
    return ChatExample(
        context + answer, (False,) * len(context) + supervised, tools_of(values, where)
    )


def _messages(values: dict[str, Any], where: str) -> Example:
    messages, supervised = conversation(values["messages"], "messages", where)
    return ChatExample(messages, supervised, tools_of(values, where))


def _sharegpt(values: dict[str, Any], where: str) -> Example:
    messages, supervised = conversation(values["conversations"], "conversations", where)
    return _with_system(ChatExample(messages, supervised, tools_of(values, where)), values)


def _alpaca_chat(values: dict[str, Any], where: str) -> Example:
    messages = []
    history = values.get("history") or []
    if not isinstance(history, list):
        raise DataError(f"{where}: history: expected a list of pairs, got {history!r:.80}")
    for turn in history:
        if not isinstance(turn, list | tuple) or [type(text) for text in turn] != [str, str]:
            raise DataError(f"{where}: history: expected pairs of strings, got {turn!r:.80}")
        messages += [_message("user", turn[0]), _message("assistant", turn[1])]
    instruction = _string(values, "instruction")
    extra = _optional_string(values, "input")
    messages += [
        _message("user", f"{instruction}\n{extra}" if extra else instruction),
        _message("assistant", _string(values, "output")),
    ]
    supervised = tuple(message["role"] == "assistant" for message in messages)
    return _with_system(ChatExample(messages, supervised), values)


def _alpaca_prompt(values: dict[str, Any], where: str) -> Example:
    instruction = _string(values, "instruction")
    extra = _optional_string(values, "input")
    template = _ALPACA_WITH_INPUT if extra else _ALPACA_WITHOUT_INPUT
    return PromptCompletionExample(
        template.format(instruction=instruction, input=extra), _string(values, "output")
    )


def _with_system(chat: ChatExample, values: dict[str, Any]) -> ChatExample:
    system = _optional_string(values, "system")
    if not system:
        return chat
    return ChatExample(
        [_message("system", system), *chat.messages], (False, *chat.supervised), chat.tools
    )


def _message(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "content": content}


def _string(values: dict[str, Any], column: str) -> str:
    value = values[column]
    if not isinstance(value, str):
        raise _NoStringError(column, value)
    return value


def _optional_string(values: dict[str, Any], column: str) -> str:
    return "" if values.get(column) is None else _string(values, column)
