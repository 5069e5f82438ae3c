"""A conversation's text, turn by turn: what inference feeds before a turn, what the turn adds, verified.

For each turn the template is asked twice: for the messages before it with the generation prompt, and for the messages
up to it. The second must begin with the first, hold the turn's own text, and end it with the stop token.

What a template leaves out, inference would not see. So of each message but an assistant's the content, and of each tool
the name, must be in the prompt after it, and in the last one; and of each turn the content, reasoning, calls and their
arguments in its own completion. That holds for the row's own texts; and for every field, as `template_coverage.py`
says, for a conversation of the same shape.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from sft_jax.data.errors import RowError
from sft_jax.data.template_coverage import holds_text, holds_value
from sft_jax.data.template_probe import TemplateFacts, heads_of_difference
from sft_jax.data.templates import ChatTemplate
from sft_jax.datatypes import Message, Origin


class Turn(NamedTuple):
    """One assistant turn as the template writes it: `prompt + completion + epilogue`."""

    message: Message
    prompt: str  # what inference feeds
    completion: str  # what the model must write, through the stop token where the template writes one
    epilogue: str  # what stands after the stop token
    stop: str  # with which the completion ends; empty where the template writes none


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
    if facts.lacking and (tools or any(message.tool_calls or message.role == "tool" for message in messages)):
        what = f"chat template {template.name} writes {', '.join(map(repr, facts.lacking))} around calls of tools"
        hint = "which the tokenizer does not have as single tokens. Add them to config.data.new_tokens, as "
        raise RowError("template", origin, f"{what}, {hint}{facts.lacking!r}, or choose another.")
    requests: list[tuple[Sequence[int], bool]] = []
    for i in turns:
        requests += ((range(i), True), (range(i + 1), False))
    texts = template.render_each(messages, requests, tools)
    what = facts.coverage.what_is_missing(messages, tools, turns)
    if what:
        raise _left_out(template, what, origin)
    rendered: list[Turn] = []
    first_new = 0  # message that no earlier turn has been checked with
    for i, prompt, whole in zip(turns, texts[::2], texts[1::2], strict=True):
        message = messages[i]
        if not whole.startswith(prompt):
            asked, written = heads_of_difference(prompt, whole)
            what = "the prompt that asks for it is no prefix of the text with it: the first goes on with "
            hint = "Set config.data.chat_template_kwargs, for example enable_thinking, or choose another template."
            raise _unverified(template, i, f"{what}{asked}, the second with {written}", origin, hint)
        stop, end = "", len(whole)
        if facts.stop.is_written:
            stop = facts.call_stop if message.tool_calls else facts.stop.text
            end = whole.find(stop, len(prompt)) + len(stop)
            if end < len(stop):
                raise _unverified(template, i, f"is not followed by the stop token {stop!r}", origin)
            if whole.find(stop, end) >= 0:  # which of them ends the answer would be a guess
                raise _unverified(template, i, f"is followed by {stop!r} more than once", origin)
        completion = whole[len(prompt) : end]
        if tools and not rendered and not all(holds_text(prompt, _name_of(tool)) for tool in tools):
            what = "the row's tools"
        first = 0 if i == turns[-1] else first_new  # and the last prompt shall hold them all
        what = what or _what_is_missing_before(messages, first, i, prompt) or _what_is_missing(message, i, completion)
        if what:
            raise _left_out(template, what, origin)
        rendered.append(Turn(message, prompt, completion, whole[end:], stop))
        first_new = i + 1
    return rendered


def _unverified(
    template: ChatTemplate, i: int, what: str, origin: Origin, hint: str = "Choose another template."
) -> RowError:
    return RowError("template", origin, f"chat template {template.name}, message {i + 1}: {what}. {hint}")


def _left_out(template: ChatTemplate, what: str, origin: Origin) -> RowError:
    hint = "Take it out of the row, choose another template, or drop such rows: config.data.policies = "
    hint += "dict(template_leaves_out='drop')."
    return RowError("template_leaves_out", origin, f"chat template {template.name} leaves out {what}. {hint}")


def _name_of(tool: dict[str, Any]) -> str:
    """The name that a schema gives its tool; empty where it has another shape."""
    function = tool.get("function", tool)
    name = function.get("name") if isinstance(function, dict) else None
    return name if isinstance(name, str) else ""


# Each names the first value that a template has left out, without showing it; or is empty.


def _what_is_missing_before(messages: Sequence[Message], first: int, i: int, prompt: str) -> str:
    for k in range(first, i):
        message = messages[k]
        if message.role != "assistant" and not holds_text(prompt, message.content):
            return f"message {k + 1}, of role {message.role}"
    return ""


def _what_is_missing(message: Message, i: int, completion: str) -> str:
    if not holds_text(completion, message.content):
        return f"the content of message {i + 1}" + (", which calls tools" if message.tool_calls else "")
    if message.reasoning and not holds_text(completion, message.reasoning):
        return f"the reasoning of message {i + 1}"
    for c, call in enumerate(message.tool_calls):
        if not holds_text(completion, call.name):
            return f"call {c + 1} of message {i + 1}"
        if not holds_text(completion, call.arguments_json) and not holds_value(completion, call.arguments):
            return f"an argument of call {c + 1} of message {i + 1}"
    return ""
