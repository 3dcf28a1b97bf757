"""Assistant masks of conversations, multi-turn too, against spans marked in the contents."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_flexft.data.files import DataError
from vllm_flexft.data.formats import ChatExample
from vllm_flexft.data.tokenize import ExampleTokenizer

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
GENERATION = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{% else %}"
    "{{ m.content }}<|im_end|>{% endif %}\n{% endfor %}"
)
# Mistral's: the turn of the assistant has no header, and BOS is in the template.
INST = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
# Qwen3's: an empty block of thoughts before the last answer only.
THINK = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# The system prompt moves to the last user message: what came before changes with every turn.
REWRITES = (
    "{% for m in messages %}{% if m.role == 'user' %}[INST] "
    "{% if loop.index0 >= messages|length - 2 %}Be brief. {% endif %}{{ m.content }} [/INST]"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
THOUGHTS_IN_PROMPT = CHATML.replace("assistant\n{% endif", "assistant\n<think>\n{% endif")

TEMPLATES = {
    # template, what follows the content and is generated too
    "chatml": (CHATML, "<|im_end|>"),
    "generation": (GENERATION, "<|im_end|>"),
    "inst": (INST, "</s>"),
}


def with_template(tokenizer: Any, template: str) -> Any:
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = template
    return tokenizer


def learnt_runs(tokenizer: Any, example: ChatExample) -> list[str]:
    """The text of every run of supervised tokens."""
    tokenise = ExampleTokenizer(tokenizer, completion_only_loss=True)
    ((ids, mask),) = tokenise([example], ["f, line 1"])
    runs: list[list[int]] = []
    previous = False
    for token, supervised in zip(ids.tolist(), mask.tolist(), strict=True):
        if supervised:
            if not previous:
                runs.append([])
            runs[-1].append(token)
        previous = supervised
    return [tokenizer.decode(run) for run in runs]


def chat(*contents: str, system: str | None = None) -> ChatExample:
    """Contents of user, assistant, user, assistant, ..."""
    messages = [{"role": "system", "content": system}] if system else []
    for i, content in enumerate(contents):
        messages.append({"role": ("user", "assistant")[i % 2], "content": content})
    return ChatExample(messages, tuple(m["role"] == "assistant" for m in messages))


# Letters at both ends: byte pairs then do not merge over a content's border ("\n" + "\n").
contents = st.from_regex(r"[a-zé東😀]([a-z 0-9é東😀\n]{0,12}[a-zé東😀])?", fullmatch=True)


@pytest.mark.parametrize("name", TEMPLATES)
@given(data=st.data())
@settings(derandomize=True, deadline=None, max_examples=60)
def test_supervised_tokens_are_the_assistants_turns(
    base_tokenizer: Any, name: str, data: st.DataObject
) -> None:
    template, ending = TEMPLATES[name]
    turns = data.draw(st.lists(st.tuples(contents, contents), min_size=1, max_size=4))
    system = data.draw(st.none() | contents) if name != "inst" else None
    example = chat(*(text for turn in turns for text in turn), system=system)
    runs = learnt_runs(with_template(base_tokenizer, template), example)
    # [/INST] stands directly before the blank that Mistral's answers begin with.
    blank = " " if name == "inst" else ""
    assert runs == [f"{blank}{answer}{ending}" for _, answer in turns]


@pytest.mark.parametrize("name", TEMPLATES)
def test_tokens_are_those_of_apply_chat_template(base_tokenizer: Any, name: str) -> None:
    tokenizer = with_template(base_tokenizer, TEMPLATES[name][0])
    example = chat("the quick", "brown fox", "jumps", "over")
    ((ids, _),) = ExampleTokenizer(tokenizer, completion_only_loss=True)([example], ["f"])
    expected = tokenizer.apply_chat_template(example.messages, tokenize=True, return_dict=True)
    assert ids.tolist() == expected["input_ids"]


def test_generation_blocks_give_the_mask_of_transformers(base_tokenizer: Any) -> None:
    tokenizer = with_template(base_tokenizer, GENERATION)
    example = chat("the quick", "brown fox", "jumps", "over")
    ((_, mask),) = ExampleTokenizer(tokenizer, completion_only_loss=True)([example], ["f"])
    expected = tokenizer.apply_chat_template(
        example.messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    assert mask.astype(int).tolist() == expected["assistant_masks"]


def test_turn_that_the_template_shortens_in_history_is_found(base_tokenizer: Any) -> None:
    runs = learnt_runs(with_template(base_tokenizer, THINK), chat("q", "one", "q", "two"))
    assert runs == ["one<|im_end|>", "<think>\n\n</think>\n\ntwo<|im_end|>"]


@pytest.mark.parametrize("template", [CHATML, GENERATION], ids=["chatml", "generation"])
def test_turn_of_weight_zero_is_no_target(base_tokenizer: Any, template: str) -> None:
    example = chat("q", "one", "q", "two")
    context_only = ChatExample(example.messages, (False, False, False, True))
    runs = learnt_runs(with_template(base_tokenizer, template), context_only)
    assert runs == ["two<|im_end|>"]


def test_whole_conversation_is_a_target_without_completion_only_loss(
    chat_tokenizer: Any,
) -> None:
    tokenise = ExampleTokenizer(chat_tokenizer, completion_only_loss=False)
    ((_, mask),) = tokenise([chat("q", "a")], ["f"])
    assert mask.tolist() == [False] + [True] * (len(mask) - 1)


@pytest.mark.parametrize(
    ("template", "example"),
    [(REWRITES, chat("q", "one", "q", "two")), (THOUGHTS_IN_PROMPT, chat("q", "one"))],
    ids=["moves the system prompt", "thoughts in the generation prompt"],
)
def test_template_that_breaks_the_prefix_property_is_refused(
    base_tokenizer: Any, template: str, example: ChatExample
) -> None:
    with pytest.raises(DataError, match=r"f, line 1: the chat template rewrites .*generation"):
        learnt_runs(with_template(base_tokenizer, template), example)


def test_conversation_that_the_template_refuses_names_its_line(base_tokenizer: Any) -> None:
    template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(DataError, match=r"f, line 1: .* refuses .*: roles must alternate"):
        learnt_runs(with_template(base_tokenizer, template), chat("q", "a"))


def test_conversation_that_begins_with_the_assistant_is_refused(chat_tokenizer: Any) -> None:
    example = ChatExample([{"role": "assistant", "content": "a"}], (True,))
    with pytest.raises(DataError, match="begins with the assistant"):
        learnt_runs(chat_tokenizer, example)
