"""Examples to token ids and targets, following TRL's SFTTrainer.

Prompt and completion are tokenised as one text, and the border is found by the tokenizer's offset
mapping. A token that covers characters of both sides (" a" + "nd" as " and") is a target: the
completion is never cut. Its few characters of the prompt are then learnt too.

Legend: S tokens of a sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

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
        self._tokenizer = tokenizer
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
            for i, ids, offsets in zip(
                rows, encoded["input_ids"], encoded["offset_mapping"], strict=True
            ):
                token_ids = np.asarray(ids, dtype=np.int32)
                mask = supervised_tokens(np.asarray(offsets).reshape(-1, 2), spans[i])
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

    def _encode(self, texts: list[str], add_special_tokens: bool, where: list[str]) -> Any:
        for text, at in zip(texts, where, strict=True):
            try:
                text.encode()
            except UnicodeEncodeError as exc:
                # json.loads lets a lone "\ud800" pass, which the tokenizer cannot take.
                raise DataError(f"{at}: not Unicode text: {exc.reason}") from None
        return self._tokenizer(
            texts,
            add_special_tokens=add_special_tokens,
            return_offsets_mapping=True,
            return_attention_mask=False,
            truncation=False,
            padding=False,
            verbose=False,  # no warning for sequences past the model's length: they are cut later
        )

    def _with_eos(self, token_ids: TokenIds, mask: Mask) -> tuple[TokenIds, Mask]:
        eos = self._tokenizer.eos_token_id
        if eos is None:
            return token_ids, mask
        if token_ids.size == 0 or token_ids[-1] != eos:
            token_ids, mask = np.append(token_ids, np.int32(eos)), np.append(mask, True)
        mask[-1] = True
        return token_ids, mask


def supervised_tokens(offsets: npt.NDArray[np.int_], spans: Sequence[Span]) -> Mask:
    """Which tokens cover a character of one of the spans.

    Offsets are not exact tilings of the text: byte-level tokenizers leave the blank of " word" out
    of the token that holds it, and give the bytes of one character the same offsets. So a token is
    taken to begin no later than where all before it ended. Tokens that the tokenizer adds have
    the empty range (0, 0) and are never supervised here.

    Args:
        offsets: (S, 2), first and last+1 character of every token.
        spans: ranges of characters.

    Returns:
        (S,) bool.
    """
    mask = np.zeros(len(offsets), dtype=np.bool_)
    if len(offsets) == 0:
        return mask
    start, end = offsets[:, 0], offsets[:, 1]
    ended = np.maximum.accumulate(np.concatenate(([0], end[:-1])))
    start = np.minimum(start, ended)
    for first, last in spans:
        mask |= (start < last) & (end > first)
    return mask
