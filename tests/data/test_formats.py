"""Detection, renaming and normalisation of the five formats."""

from __future__ import annotations

from typing import Any

import pytest

from vllm_flexft.config import DatasetConfig
from vllm_flexft.data.files import DataError, SourceRow
from vllm_flexft.data.formats import (
    ChatExample,
    Example,
    PromptCompletionExample,
    TextExample,
    normaliser,
)

USER = {"role": "user", "content": "q"}
ASSISTANT = {"role": "assistant", "content": "a"}


def normalised(values: dict[str, Any], *, chat_template: bool = True, **config: Any) -> Example:
    row = SourceRow(0, "f, line 1", values)
    return normaliser(DatasetConfig(path="f", **config), row, has_chat_template=chat_template)(row)


def refusal(values: dict[str, Any], **kwargs: Any) -> str:
    with pytest.raises(DataError) as caught:
        normalised(values, **kwargs)
    assert str(caught.value).startswith("f, line 1: ")
    return str(caught.value)


CHAT = ChatExample([USER, ASSISTANT], (False, True))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"messages": [USER, ASSISTANT]}, CHAT),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, CHAT),
        ({"conversations": [USER, ASSISTANT]}, CHAT),
        ({"instruction": "q", "input": "", "output": "a", "text": "formatted"}, CHAT),
        ({"instruction": "q", "output": "a"}, CHAT),
        ({"prompt": "q", "completion": "a"}, PromptCompletionExample("q", "a")),
        ({"question": "q", "answer": "a"}, PromptCompletionExample("q", "a")),
        ({"prompt": [USER], "completion": [ASSISTANT]}, CHAT),
        ({"text": "t"}, TextExample("t")),
        ({"messages": '[{"role": "user", "content": "q"}, {"from": "gpt", "value": "a"}]'}, CHAT),
    ],
)
def test_format_is_detected_by_its_columns(values: dict[str, Any], expected: Example) -> None:
    assert normalised(values) == expected


def test_columns_are_renamed_before_detection() -> None:
    columns = {"prompt": "ask", "completion": "reply"}
    assert normalised({"ask": "q", "reply": "a"}, columns=columns) == PromptCompletionExample(
        "q", "a"
    )


def test_named_format_wins_over_detection() -> None:
    values = {"text": "t", "messages": [USER, ASSISTANT]}
    assert normalised(values, format="text") == TextExample("t")


def test_alpaca_input_follows_the_instruction_on_its_own_line() -> None:
    example = normalised({"instruction": "i", "input": "x", "output": "a"})
    assert isinstance(example, ChatExample)
    assert example.messages[0]["content"] == "i\nx"


def test_alpaca_without_chat_template_takes_the_stanford_prompt() -> None:
    with_input = normalised(
        {"instruction": "{i}", "input": "x", "output": "a"}, chat_template=False
    )
    without = normalised({"instruction": "i", "input": "", "output": "a"}, chat_template=False)
    assert isinstance(with_input, PromptCompletionExample)
    assert isinstance(without, PromptCompletionExample)
    assert with_input.prompt.endswith("### Instruction:\n{i}\n\n### Input:\nx\n\n### Response:")
    assert without.prompt.endswith("the request.\n\n### Instruction:\ni\n\n### Response:")
    assert with_input.completion == without.completion == "a"


def test_alpaca_history_and_system_become_turns() -> None:
    example = normalised(
        {"instruction": "q", "output": "a", "system": "s", "history": [["q0", "a0"]]}
    )
    assert isinstance(example, ChatExample)
    assert [message["content"] for message in example.messages] == ["s", "q0", "a0", "q", "a"]
    assert example.supervised == (False, False, True, False, True)


def test_sharegpt_roles_and_system_column() -> None:
    turns = [{"from": who, "value": "x"} for who in ("human", "gpt", "observation", "gpt")]
    example = normalised({"conversations": turns, "system": "s"})
    assert isinstance(example, ChatExample)
    roles = [message["role"] for message in example.messages]
    assert roles == ["system", "user", "assistant", "tool", "assistant"]


def test_conversational_completion_alone_is_a_target() -> None:
    example = normalised({"prompt": [USER, ASSISTANT, USER], "completion": [ASSISTANT]})
    assert isinstance(example, ChatExample)
    assert example.supervised == (False, False, False, True)


def test_message_of_weight_zero_is_no_target() -> None:
    example = normalised({"messages": [USER, {**ASSISTANT, "weight": 0}, USER, ASSISTANT]})
    assert isinstance(example, ChatExample)
    assert example.supervised == (False, False, False, True)
    assert example.messages[1] == ASSISTANT


def test_text_parts_are_joined_and_tool_arguments_parsed() -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    example = normalised(
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "a"}, "b"]},
                {"role": "assistant", "content": None, "tool_calls": [call]},
            ],
            "tools": '[{"type": "function"}]',
        }
    )
    assert isinstance(example, ChatExample)
    assert example.messages[0]["content"] == "ab"
    assert example.messages[1]["tool_calls"][0]["function"]["arguments"] == {"x": 1}
    assert example.tools == [{"type": "function"}]


@pytest.mark.parametrize(
    ("values", "kwargs", "expected"),
    [
        ({"foo": 1, "bar": 2}, {}, "foo, bar; wanted messages (messages); conversations"),
        ({"chosen": "a", "rejected": "b"}, {}, "preference pairs are not supported"),
        ({"foo": 1}, {"format": "alpaca"}, "wants the columns instruction, output; found foo"),
        ({"foo": 1}, {"columns": {"text": "bar"}}, "no column 'bar', named in columns.text"),
        ({"text": None}, {}, "column 'text': expected a string, got None"),
        ({"prompt": "p", "completion": 5}, {}, "column 'completion': expected a string, got 5"),
        (
            {"q": "p", "a": None},
            {"columns": {"prompt": "q", "completion": "a"}},
            "column 'a' (completion): expected a string, got None",
        ),
        ({"question": None, "answer": "a"}, {}, "column 'question' (prompt): expected a string"),
        ({"messages": []}, {}, "messages: expected a non-empty list"),
        ({"messages": "{"}, {}, "messages: not JSON"),
        ({"messages": [USER, "x"]}, {}, "messages[1]: expected an object"),
        ({"messages": [{"role": "bot"}]}, {}, "messages[0]: role 'bot' is none of system"),
        ({"messages": [{"role": "user"}]}, {}, "messages[0]: content: expected a string"),
        ({"messages": [{**USER, "content": [{"type": "image"}]}]}, {}, "a part that is no text"),
        ({"messages": [{**ASSISTANT, "weight": 2}]}, {}, "weight 2: expected 0 or 1"),
        ({"messages": [USER], "tools": "x"}, {}, "tools: not JSON"),
        ({"conversations": [{"from": "function_call", "value": ""}]}, {}, "with tool_calls"),
        ({"messages": [USER, ASSISTANT]}, {"chat_template": False}, "has no chat template"),
        ({"prompt": "p", "completion": [ASSISTANT]}, {}, "prompt: not JSON"),
        ({"instruction": "i", "output": "o", "history": ["x"]}, {}, "expected pairs of strings"),
    ],
)
def test_wrong_row_is_refused_with_what_was_wanted(
    values: dict[str, Any], kwargs: dict[str, Any], expected: str
) -> None:
    assert expected in refusal(values, **kwargs)


def test_later_row_without_the_column_is_refused_with_its_line() -> None:
    first = SourceRow(0, "f, line 1", {"text": "t"})
    normalise = normaliser(DatasetConfig(path="f"), first, has_chat_template=False)
    with pytest.raises(DataError, match="f, line 9: no column 'text'; found txt"):
        normalise(SourceRow(8, "f, line 9", {"txt": "t"}))
