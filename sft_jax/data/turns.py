"""A conversation's text, turn by turn: what inference feeds before a turn, what the turn adds, verified.

For each turn the template is asked twice: for the messages before it with the generation prompt, and for the messages
up to it. The second must begin with the first, hold the turn's own text, and end it with the stop token. Nothing of a
message may be missing from either: what a template leaves out, inference would not see.
"""

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from sft_jax.data.disguise import strings_in
from sft_jax.data.errors import RowError
from sft_jax.data.template_probe import TemplateFacts
from sft_jax.data.templates import ChatTemplate
from sft_jax.datatypes import Message, Origin


class Turn(NamedTuple):
    """One assistant turn as the template writes it: `prompt + completion + epilogue`."""

    message: Message
    prompt: str  # what inference feeds
    completion: str  # what the model must write, through the stop token where the template writes one
    epilogue: str  # what stands after the stop token
    stop: str


def render_turns(
    template: ChatTemplate,
    facts: TemplateFacts,
    messages: Sequence[Message],
    tools: Sequence[dict[str, Any]],
    turns: Sequence[int],
    origin: Origin,
) -> list[Turn]:
    """The turns of the given message numbers, which are ascending and assistant's.

    Raises:
      TemplateError: the template does not take these messages.
      RowError: `template`: a turn cannot be verified; `template_leaves_out`: text of the row is not in what it renders.
    """
    requests = [(messages[: i + after], not after) for i in turns for after in (0, 1)]
    texts = template.render_each(requests, tools)
    rendered = []
    first_new = 0  # message that no earlier turn has been checked with
    for i, prompt, whole in zip(turns, texts[::2], texts[1::2], strict=True):
        if not whole.startswith(prompt):
            at = next(k for k in range(len(whole) + 1) if whole[: k + 1] != prompt[: k + 1])
            what = (
                f"chat template {template.name}, message {i + 1}: the prompt that asks for it is no prefix of the text "
                f"with it: the first goes on with {_head_of(prompt[at:])}, the second with {_head_of(whole[at:])}"
            )
            raise RowError("template", origin, f"{what}. Choose another template.")
        message = messages[i]
        stop = facts.call_stop if message.tool_calls else facts.stop.text
        end = len(whole)
        if facts.stop.is_written:
            end = whole.find(stop, len(prompt)) + len(stop)
            if end < len(stop):
                what = f"chat template {template.name}, message {i + 1}: is not followed by the stop token {stop!r}"
                raise RowError("template", origin, f"{what}. Choose another template.")
            if whole.find(stop, end) >= 0:  # which of them ends the answer would be a guess
                what = f"chat template {template.name}, message {i + 1}: is followed by {stop!r} more than once"
                raise RowError("template", origin, f"{what}. Choose another template.")
        completion = whole[len(prompt) : end]
        what = "" if first_new or not tools else _what_is_missing_of_tools(tools, prompt)
        what = (
            what or _what_is_missing_before(messages, first_new, i, prompt) or _what_is_missing(message, i, completion)
        )
        if what:
            raise RowError(
                "template_leaves_out",
                origin,
                f"chat template {template.name} leaves out {what}. Take it out of the row, or choose another template.",
            )
        rendered.append(Turn(message, prompt, completion, whole[end:], stop))
        first_new = i + 1
    return rendered


def _head_of(text: str) -> str:
    """The beginning of a text, for a message."""
    return repr(text[:24]) if text else "nothing"


def _holds(text: str, part: str) -> bool:
    """Whether a template has written `part`, but for the whitespace around it and JSON's escapes."""
    part = part.strip()
    return part in text or json.dumps(part, ensure_ascii=False)[1:-1] in text or json.dumps(part)[1:-1] in text


def _name_of(tool: dict[str, Any]) -> str:
    """The name that a schema gives its tool; empty where it has another shape."""
    function = tool.get("function", tool)
    name = function.get("name") if isinstance(function, dict) else None
    return name if isinstance(name, str) else ""


# Each names the first thing that a template has left out, without showing it; or is empty.


def _what_is_missing_of_tools(tools: Sequence[dict], prompt: str) -> str:
    return "" if all(_holds(prompt, _name_of(tool)) for tool in tools) else "the row's tools"


def _what_is_missing_before(messages: Sequence[Message], first: int, i: int, prompt: str) -> str:
    """Of assistant turns that are not trained, nothing need be there: templates rewrite history."""
    for k in range(first, i):
        message = messages[k]
        if message.role != "assistant" and not _holds(prompt, message.content):
            return f"message {k + 1}, of role {message.role}"
    return ""


def _what_is_missing(message: Message, i: int, completion: str) -> str:
    if not _holds(completion, message.content):
        return f"the content of message {i + 1}" + (", which calls tools" if message.tool_calls else "")
    if message.reasoning and not _holds(completion, message.reasoning):
        return f"the reasoning of message {i + 1}"
    for call in message.tool_calls:
        if not all(_holds(completion, text) for text in (call.name, *strings_in(call.arguments))):
            return f"a tool call, or an argument of one, of message {i + 1}"
    return ""
