"""Conversations through the model's chat template, and what the assistant wrote in the result.

Two ways to find the assistant's characters. A template with `{% generation %}` blocks says so
itself. For any other, turn i begins where the rendering of the messages before it, with the
generation prompt, ends: exactly what the server feeds the model before it answers. That holds only
if this rendering is a prefix of the whole conversation's, which is checked for every row.
"""

from __future__ import annotations

import re
from typing import Any

from vllm_flexft.data.files import DataError
from vllm_flexft.data.formats import ChatExample

Span = tuple[int, int]  # characters [start, end)

_GENERATION_BLOCK = re.compile(r"\{%-?\s*generation\s*-?%\}")


class ChatRenderer:
    """Renders conversations with a tokenizer's chat template.

    Args:
        tokenizer: a transformers tokenizer with a chat template.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder.values()
        self._special_tokens = tuple(
            {*tokenizer.all_special_tokens, *(token.content for token in added if token.special)}
        )

    def render(self, example: ChatExample, where: str) -> tuple[str, list[Span]]:
        """Text of the conversation, and the spans of the supervised turns in it.

        A span runs from the end of the generation prompt through the token that ends the turn;
        a template's line break after that token is not generated and no target.

        Raises:
            DataError: the template refuses the conversation, or rewrites earlier messages so that
                the turns cannot be told apart.
        """
        template = self._tokenizer.get_chat_template(tools=example.tools)
        if _GENERATION_BLOCK.search(template):
            return self._render_generation_blocks(example, template, where)
        text = self._apply(example.messages, example.tools, where)
        turns = [i for i, supervised in enumerate(example.supervised) if supervised]
        spans = [self._span_of_turn(example, i, text, where) for i in turns]
        return text, spans

    def render_text(self, example: ChatExample, where: str) -> str:
        """Text of the conversation alone."""
        return self._apply(example.messages, example.tools, where)

    def _span_of_turn(self, example: ChatExample, turn: int, text: str, where: str) -> Span:
        messages, tools = example.messages, example.tools
        if turn == 0:
            raise DataError(
                f"{where}: the conversation begins with the assistant; begin with a user or "
                "system message"
            )
        prompt = self._apply(messages[:turn], tools, where, add_generation_prompt=True)
        if not text.startswith(prompt):
            raise self._not_a_prefix(turn, where)
        start = len(prompt)
        upto = self._apply(messages[: turn + 1], tools, where)
        upto_end = upto.rstrip()
        closing = next((t for t in self._special_tokens if t and upto_end.endswith(t)), None)
        if text.startswith(upto):
            return start, len(upto_end) if closing else len(upto)
        # The template shortens a turn once it is history (Qwen3 drops the empty <think> block):
        # the turn then ends at the first of the tokens that end it.
        end = text.find(closing, start) if closing else -1
        if closing is None or end < 0:
            raise self._not_a_prefix(turn, where)
        return start, end + len(closing)

    def _render_generation_blocks(
        self, example: ChatExample, template: str, where: str
    ) -> tuple[str, list[Span]]:
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            texts, indices = render_jinja_template(
                conversations=[example.messages],
                tools=example.tools,
                chat_template=template,
                return_assistant_tokens_mask=True,
                **self._tokenizer.special_tokens_map,
            )
        except Exception as exc:  # as in _apply
            raise _refused(exc, where) from exc
        assistant = [
            supervised
            for message, supervised in zip(example.messages, example.supervised, strict=True)
            if message["role"] == "assistant"
        ]
        spans = [(int(start), int(end)) for start, end in indices[0]]
        if all(assistant):
            return texts[0], spans
        if len(spans) != len(assistant):
            raise DataError(
                f"{where}: some assistant turns are context only, but the chat template has "
                f"{len(spans)} generation blocks for {len(assistant)} turns"
            )
        return texts[0], [span for span, target in zip(spans, assistant, strict=True) if target]

    def _apply(
        self,
        messages: list[dict[str, Any]],
        tools: list[Any] | None,
        where: str,
        add_generation_prompt: bool = False,
    ) -> str:
        try:
            rendered: str = self._tokenizer.apply_chat_template(
                messages,
                tools=tools,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
            )
        except Exception as exc:
            # A template is a program: besides raise_exception it can fail in any way.
            raise _refused(exc, where) from exc
        return rendered

    @staticmethod
    def _not_a_prefix(turn: int, where: str) -> DataError:
        return DataError(
            f"{where}: the chat template rewrites earlier messages, so that the assistant's turn "
            f"(message {turn}) cannot be told apart; use a template with {{% generation %}} "
            "blocks, prompt and completion as strings, or completion_only_loss: false"
        )


def _refused(exc: Exception, where: str) -> DataError:
    return DataError(f"{where}: the chat template refuses this conversation: {exc}")
