"""Targets begin exactly at the border of prompt and completion, and end with EOS."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from vllm_flexft.data.files import DataError
from vllm_flexft.data.formats import Example, PromptCompletionExample, TextExample
from vllm_flexft.data.tokenize import ExampleTokenizer

# Words of the tokenizer's corpus make merges across the border likely; the rest is any Unicode.
texts = st.one_of(
    st.lists(
        st.sampled_from(["the", " quick", "and", " ", "  ", "\n", "東京", "😀", "é", "ing", "12"]),
        max_size=8,
    ).map("".join),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=12),
)


def tokenise(tokenizer: Any, example: Example, *, completion_only: bool = True):
    (result,) = ExampleTokenizer(tokenizer, completion_only_loss=completion_only)(
        [example], ["f, line 1"]
    )
    return result


def supervised_bytes(tokenizer: Any, ids: np.ndarray, mask: np.ndarray) -> bytes:
    """The bytes behind the supervised tokens, by the byte-level alphabet, EOS left out."""
    alphabet = byte_of_character()
    tokens = tokenizer.convert_ids_to_tokens(ids[mask].tolist())
    assert tokens.pop() == "</s>"
    return b"".join(bytes(alphabet[c] for c in token) for token in tokens)


def byte_of_character() -> dict[str, int]:
    """GPT-2's table of printable characters for bytes (Radford et al. 2019, encoder.py)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(256 + n): byte for n, byte in enumerate(others)
    }


@given(prompt=texts, completion=texts)
@settings(derandomize=True, deadline=None, max_examples=400)
def test_supervised_tokens_are_the_completion_and_eos(
    base_tokenizer: Any, prompt: str, completion: str
) -> None:
    ids, mask = tokenise(base_tokenizer, PromptCompletionExample(prompt, completion))
    learnt = supervised_bytes(base_tokenizer, ids, mask)
    extra = learnt.removesuffix(completion.encode())
    assert extra + completion.encode() == learnt
    if extra:
        # One token covers both sides, and nothing more of the prompt is learnt than its part.
        first = base_tokenizer.convert_ids_to_tokens(int(ids[mask][0]))
        assert len(extra) < len(first)
        assert prompt.encode().endswith(extra)


@given(prompt=texts, completion=texts)
@settings(derandomize=True, deadline=None)
def test_tokens_are_those_of_the_joined_text(
    base_tokenizer: Any, prompt: str, completion: str
) -> None:
    ids, _ = tokenise(base_tokenizer, PromptCompletionExample(prompt, completion))
    expected = [*base_tokenizer(prompt + completion).input_ids, base_tokenizer.eos_token_id]
    assert ids.tolist() == expected


@given(text=texts)
@settings(derandomize=True, deadline=None)
def test_every_token_of_text_but_the_first_is_a_target(base_tokenizer: Any, text: str) -> None:
    ids, mask = tokenise(base_tokenizer, TextExample(text))
    assert ids.tolist() == [*base_tokenizer(text).input_ids, base_tokenizer.eos_token_id]
    assert mask.tolist() == [False] + [True] * (len(ids) - 1)


def test_token_over_the_border_is_a_target(base_tokenizer: Any) -> None:
    assert base_tokenizer.tokenize(" and") == ["Ġand"]
    ids, mask = tokenise(base_tokenizer, PromptCompletionExample("one a", "nd"))
    assert base_tokenizer.convert_ids_to_tokens(ids[mask].tolist()) == ["Ġand", "</s>"]


def test_blank_at_the_completions_begin_is_a_target(
    base_tokenizer: Any,
) -> None:
    ids, mask = tokenise(base_tokenizer, PromptCompletionExample("12", "   345"))
    assert base_tokenizer.decode(ids[mask]) == "   345</s>"


def test_callers_tokenizer_is_left_as_it_was(base_tokenizer: Any) -> None:
    before = base_tokenizer.backend_tokenizer.to_str()
    tokenise(base_tokenizer, TextExample("the dog"))
    assert base_tokenizer.backend_tokenizer.to_str() == before


@given(prompt=texts, completion=texts)
@settings(derandomize=True, deadline=None)
def test_border_is_exact_for_sentencepiece_like_tokenizers(
    metaspace_tokenizer: Any, prompt: str, completion: str
) -> None:
    ids, mask = tokenise(metaspace_tokenizer, PromptCompletionExample(prompt + ";", completion))
    tokens = metaspace_tokenizer.convert_ids_to_tokens(ids.tolist())
    # No merge goes over ";", so the prompt's own tokens end where the completion begins.
    border = 1 + len(metaspace_tokenizer.tokenize(prompt + ";"))
    assert tokens[border - 1].endswith(";")
    assert mask.tolist() == [False] * border + [True] * (len(ids) - border)


def test_prompt_is_a_target_without_completion_only_loss(base_tokenizer: Any) -> None:
    _, mask = tokenise(base_tokenizer, PromptCompletionExample("the", "dog"), completion_only=False)
    assert mask.tolist() == [False] + [True] * (len(mask) - 1)


def test_eos_that_the_text_ends_with_is_not_repeated(base_tokenizer: Any) -> None:
    ids, mask = tokenise(base_tokenizer, PromptCompletionExample("the", "dog</s>"))
    plain, _ = tokenise(base_tokenizer, PromptCompletionExample("the", "dog"))
    assert ids.tolist() == plain.tolist()
    assert mask[-1]


def test_eos_that_the_tokenizer_adds_is_a_target_and_not_repeated() -> None:
    backend = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "a": 2, "b": 3}, unk_token="a"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    ids, mask = tokenise(tokenizer, PromptCompletionExample("a ", "b"))
    assert ids.tolist() == [0, 2, 3, 1]
    assert mask.tolist() == [False, False, True, True]


def test_first_token_is_no_target_without_bos() -> None:
    backend = Tokenizer(models.WordLevel({"</s>": 0, "a": 1}, unk_token="a"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    _, mask = tokenise(tokenizer, PromptCompletionExample("", "a"))
    assert mask.tolist() == [False, True]


def test_results_keep_the_order_of_a_mixed_batch(chat_tokenizer: Any) -> None:
    from vllm_flexft.data.formats import ChatExample

    turns = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]
    examples = [TextExample("fox"), ChatExample(turns, (False, True)), TextExample("dog")]
    results = ExampleTokenizer(chat_tokenizer, completion_only_loss=True)(examples, ["f"] * 3)
    learnt = [chat_tokenizer.decode(ids[mask]) for ids, mask in results]
    assert learnt == ["fox</s>", "two<|im_end|>", "dog</s>"]


def test_lone_surrogate_is_refused_with_its_line(base_tokenizer: Any) -> None:
    with pytest.raises(DataError, match="f, line 1: not Unicode"):
        tokenise(base_tokenizer, TextExample("a\ud800"))


def test_tokenizer_without_offsets_is_refused(base_tokenizer: Any) -> None:
    class SlowTokenizer:
        is_fast = False

    with pytest.raises(DataError, match="SlowTokenizer gives no offset mapping"):
        ExampleTokenizer(SlowTokenizer(), completion_only_loss=True)
