"""A conversation in which no text can be taken for a control token, and the way back after rendering.

One character of each look-alike, in any field, is replaced by a private-use character that occurs nowhere else:

    user "say <|im_end|>"  ->  "say ·|im_end|>"  ->  template  ->  cut at control tokens  ->  "say <|im_end|>" as text
"""

import json
from collections.abc import Callable, Iterator
from typing import Any

from sft_jax.data.control_tokens import ControlTokens
from sft_jax.datatypes import Conversation, Message, ToolCall


class Disguise:
    """Private-use characters that stand for characters of one conversation's control look-alikes."""

    def __init__(self, text: str):
        """`text` is everything that will be rendered: its own private-use characters are not used."""
        self._free = (
            chr(code) for code in range(0xE000, 0xF900) if chr(code) not in text and _escape(code) not in text
        )
        self._hidden: dict[str, str] = {}

    def hide(self, character: str) -> str:
        if character not in self._hidden:
            self._hidden[character] = next(self._free)
        return self._hidden[character]

    def reveal(self, text: str) -> str:
        for character, stand_in in reversed(self._hidden.items()):  # a stand-in may itself have been hidden
            text = text.replace(stand_in, character)
            text = text.replace(_escape(ord(stand_in)), character)  # as JSON in ASCII, or a repr, has written it
        return text


def _escape(code: int) -> str:
    return f"\\u{code:04x}"


def disguise_conversation(
    conversation: Conversation, control: ControlTokens, template_text: str
) -> tuple[Conversation, Disguise | None]:
    """The conversation to render, and None where nothing in it can be taken for control."""
    if not any(map(control.may_form_in, texts_of(conversation))):
        return conversation, None
    texts = list(texts_of(conversation))
    # JSON, because templates print objects so, and escapes are then not mistaken for ours.
    disguise = Disguise(template_text + "".join(texts) + json.dumps(texts))

    def hide(text: str) -> str:
        return control.disguise(text, disguise.hide)

    messages = tuple(_map_message(message, hide) for message in conversation.messages)
    return conversation._replace(messages=messages, tools=_map_strings(conversation.tools, hide)), disguise


def texts_of(conversation: Conversation) -> Iterator[str]:
    """Every text of a row that a template may write."""
    for message in conversation.messages:
        yield message.content
        if message.role == "assistant":
            if message.reasoning:
                yield message.reasoning
            for call in message.tool_calls:
                yield from (call.id, call.name, call.arguments_json)
                yield from strings_in(call.arguments)
        elif message.role == "tool":
            yield from (message.name, message.tool_call_id)
        elif message.name:
            yield message.name
    if conversation.tools:
        yield from strings_in(conversation.tools)


def _map_message(message: Message, hide: Callable[[str], str]) -> Message:
    calls = tuple(
        ToolCall(hide(call.name), _map_strings(call.arguments, hide), hide(call.arguments_json), hide(call.id))
        for call in message.tool_calls
    )
    content, reasoning, tool_call_id, name = map(
        hide, (message.content, message.reasoning, message.tool_call_id, message.name)
    )
    return Message(message.role, content, reasoning, calls, tool_call_id, name, message.loss_weight)


def strings_in(value: Any) -> Iterator[str]:
    """Every key and string in a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from strings_in(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from strings_in(item)


def _map_strings(value: Any, hide: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return hide(value)
    if isinstance(value, dict):
        return {hide(key): _map_strings(item, hide) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_map_strings(item, hide) for item in value)
    return value
