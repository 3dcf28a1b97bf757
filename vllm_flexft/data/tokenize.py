"""Examples to token ids and targets, following TRL's SFTTrainer.

Prompt and completion are tokenised as one text, and the border is found by the tokenizer's offset
mapping. A token that covers characters of both sides (" a" + "nd" as " and") is a target: the
completion is never cut. Its few characters of the prompt are then learnt too.

Legend: S tokens of a sequence.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Encoding, Tokenizer

from vllm_flexft.data.chat import ChatRenderer, Span
from vllm_flexft.data.files import DataError
from vllm_flexft.data.formats import ChatExample, Example, PromptCompletionExample, TextExample

TokenIds = npt.NDArray[np.int32]
Mask = npt.NDArray[np.bool_]


class ExampleTokenizer:
    """Tokenises batches of examples.

    Args:
        tokenizer: a transformers tokenizer backed by the `tokenizers` library ("fast").
        completion_only_loss: False makes every token a target.

    Raises:
        DataError: the tokenizer gives no offset mapping.
    """

    def __init__(self, tokenizer: Any, *, completion_only_loss: bool) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise DataError(
                f"{type(tokenizer).__name__} gives no offset mapping, which the loss mask needs; "
                "serve the model with its fast tokenizer (--tokenizer-mode hf)"
            )
        self._backend = _with_exact_offsets(tokenizer.backend_tokenizer)
        self._eos: int | None = tokenizer.eos_token_id
        self._completion_only_loss = completion_only_loss
        self._chat = ChatRenderer(tokenizer) if tokenizer.chat_template else None

    def __call__(
        self, examples: Sequence[Example], where: Sequence[str]
    ) -> list[tuple[TokenIds, Mask]]:
        """Token ids (S,) and targets (S,) of every example, in order, not yet truncated.

        Token 0 is never a target, since nothing predicts it. EOS is appended to text and
        completion where the text or the tokenizer has not put it there; a conversation ends as
        its template ends it.

        Args:
            where: the place of each example in its file, for messages.
        """
        texts, spans = zip(
            *(self._text_and_spans(ex, at) for ex, at in zip(examples, where, strict=True)),
            strict=True,
        )
        is_chat = [isinstance(example, ChatExample) for example in examples]
        out: dict[int, tuple[TokenIds, Mask]] = {}
        # One call of the Rust tokenizer a kind: it runs in parallel and outside the GIL.
        for chat in (False, True):
            rows = [i for i, kind in enumerate(is_chat) if kind is chat]
            if not rows:
                continue
            # A chat template writes BOS itself.
            encoded = self._encode([texts[i] for i in rows], not chat, [where[i] for i in rows])
            for i, encoding in zip(rows, encoded, strict=True):
                token_ids = np.asarray(encoding.ids, dtype=np.int32)
                mask = supervised_tokens(np.asarray(encoding.offsets).reshape(-1, 2), spans[i])
                out[i] = (token_ids, mask) if chat else self._with_eos(token_ids, mask)
                if not self._completion_only_loss or isinstance(examples[i], TextExample):
                    out[i][1][:] = True
                out[i][1][:1] = False
        return [out[i] for i in range(len(examples))]

    def _text_and_spans(self, example: Example, where: str) -> tuple[str, list[Span]]:
        if isinstance(example, ChatExample):
            assert self._chat is not None, "normaliser() refuses chats without a template"
            if self._completion_only_loss:
                return self._chat.render(example, where)
            return self._chat.render_text(example, where), []
        if isinstance(example, PromptCompletionExample):
            text = example.prompt + example.completion
            return text, [(len(example.prompt), len(text))]
        return example.text, []

    def _encode(
        self, texts: list[str], add_special_tokens: bool, where: list[str]
    ) -> list[Encoding]:
        for text, at in zip(texts, where, strict=True):
            try:
                text.encode()
            except UnicodeEncodeError as exc:
                # json.loads lets a lone "\ud800" pass, which the tokenizer cannot take.
                raise DataError(f"{at}: not Unicode text: {exc.reason}") from None
        return self._backend.encode_batch(texts, add_special_tokens=add_special_tokens)

    def _with_eos(self, token_ids: TokenIds, mask: Mask) -> tuple[TokenIds, Mask]:
        if self._eos is None:
            return token_ids, mask
        if token_ids.size == 0 or token_ids[-1] != self._eos:
            token_ids, mask = np.append(token_ids, np.int32(self._eos)), np.append(mask, True)
        mask[-1] = True
        return token_ids, mask


def _with_exact_offsets(backend: Tokenizer) -> Tokenizer:
    """A copy that neither truncates nor pads, and counts a token's blanks to the token.

    Byte-level post-processors trim blanks off the offsets (`trim_offsets`), so that " " covers
    nothing and a border before a blank could not be told. The copy also keeps the caller's
    tokenizer, whose truncation is a mutable setting, out of this thread.
    """
    backend = copy.deepcopy(backend)
    backend.no_truncation()
    backend.no_padding()
    processor = backend.post_processor
    if processor is not None:
        state = json.loads(processor.__getstate__())
        processor.__setstate__(json.dumps(_without_trimming(state)).encode())
        backend.post_processor = processor
    return backend


def _without_trimming(state: Any) -> Any:
    if isinstance(state, list):
        return [_without_trimming(item) for item in state]
    if isinstance(state, dict):
        return {
            key: False if key == "trim_offsets" else _without_trimming(value)
            for key, value in state.items()
        }
    return state


def supervised_tokens(offsets: npt.NDArray[np.int_], spans: Sequence[Span]) -> Mask:
    """Which tokens cover a character of one of the spans.

    The bytes of one character share its offsets, so all of them are. Tokens that the tokenizer adds
    have the empty range (0, 0) and are never supervised here.

    Args:
        offsets: (S, 2), first and last+1 character of every token.
        spans: ranges of characters.

    Returns:
        (S,) bool.
    """
    mask = np.zeros(len(offsets), dtype=np.bool_)
    start, end = offsets[:, 0], offsets[:, 1]
    for first, last in spans:
        mask |= (start < last) & (end > first)
    return mask
