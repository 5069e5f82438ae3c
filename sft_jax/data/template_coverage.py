"""The shape of a conversation -> what a chat template leaves out of it.

A value of a row proves little: `2` stands in many a text that has lost it. But what a template writes hangs on the
shape of a conversation (roles, which fields are there, how many calls), so each new shape is rendered once as a
*stand-in* with unmistakable words in every field. What is missing there is missing from every row of the shape:

    user "Hi", assistant calls add(a=2)   ->   user "zqbbbbbbx", assistant calls zqbbbbbcx(zqbbbbbdx=7351, ...)
"""

import itertools
import json
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from sft_jax.data.templates import ChatTemplate, TemplateError
from sft_jax.datatypes import Message, ToolCall

_MAX_SHAPES = 100_000  # some 50 MB; then they are found out anew
_NUM_LAST_ROUNDS = 2  # of long conversations


class Gap(NamedTuple):
    """Something that a template leaves out, as errors name it, with `{}` for the number of a message. `part` is what a
    row must have to lose it, where its shape does not say so: of the schemas of tools, or of a call, a kind of value
    among its arguments."""

    what: str
    message: int = 0
    part: str = ""
    call: int = -1


class TemplateCoverage:
    """What one template leaves out, by shape."""

    def __init__(self, template: ChatTemplate):
        self._template = template
        self._gaps: dict[Hashable, tuple[Gap, ...]] = {}

    def what_is_missing(
        self, messages: Sequence[Message], tools: Sequence[dict[str, Any]], turns: Sequence[int]
    ) -> str:
        """The first thing of a row that is not in the texts of these assistant turns; empty if there is none.

        What must be there: in the prompt of each of these turns, the tools (names, descriptions, parameters with theirs
        and with their choices), and all messages before it: their content, except that of assistant turns that call
        tools; in the turn's own completion, its content, its reasoning, each of its calls, and each argument.

        What need not: the rest of earlier assistant turns, as templates rewrite history. The id and name of a result,
        where it stands at the place of the call that it answers. And what is left out only of the middle of long
        conversations, or only by a template that does not take the stand-in.
        """
        own = [_shape_of(message) for message in messages]
        of_tools = (len(tools) > 1, "function" in tools[0]) if tools else None
        found = []
        new: dict[Hashable, Sequence[Message]] = {}
        for turn in turns:
            kept: Sequence[int] = range(turn + 1)
            shape = (of_tools, *own[: turn + 1])
            if turn > 2 * _NUM_LAST_ROUNDS:
                kept = _ends_of(messages, turn)
                shape = (of_tools, *[own[k] for k in kept])
            gaps = self._gaps.get(shape)
            if gaps is None:
                new[shape] = [messages[k] for k in kept]
            if gaps != ():
                found.append((shape, kept))
        if not found:
            return ""
        if new:
            self._find_gaps(new, tools)
        for gap, kept in ((gap, kept) for shape, kept in found for gap in self._gaps[shape]):
            if not gap.part or _has(gap, [messages[k] for k in kept], tools):
                return gap.what.format(kept[gap.message] + 1)
        return ""

    def _find_gaps(self, new: Mapping[Hashable, Sequence[Message]], tools: Sequence[dict]) -> None:
        """Each shape with messages of it, which end with the turn."""
        if len(self._gaps) > _MAX_SHAPES:
            self._gaps = {}
        self._gaps |= dict.fromkeys(new, ())
        for is_full in (True, False):  # some templates take no nested values
            words = map(_word, itertools.count())
            shown_tools = [_schema(words, is_full, "function" in tools[0]) for _ in tools[:2]]
            shown = {shape: list(_stand_ins(messages, words, is_full)) for shape, messages in new.items()}
            requests: list[tuple[Sequence[int], bool]] = []
            start = 0
            for own in shown.values():
                stop = start + len(own)
                requests += ((range(start, stop - 1), True), (range(start, stop), False))
                start = stop
            try:
                texts = self._template.render_each([*itertools.chain(*shown.values())], requests, shown_tools)
            except TemplateError:
                continue
            for (shape, own), prompt, whole in zip(shown.items(), texts[::2], texts[1::2], strict=True):
                if whole.startswith(prompt):  # or the row is refused for that
                    gaps = (_gaps_of_tools(shown_tools, prompt), _gaps_before(own[:-1], prompt))
                    in_turn = _gaps_of_turn(own[-1], len(own) - 1, whole[len(prompt) :])
                    self._gaps[shape] = tuple(itertools.chain(*gaps, in_turn))
            return


def _ends_of(messages: Sequence[Message], turn: int) -> Sequence[int]:
    """The messages up to a turn; of many rounds (an assistant's message and what follows it) the first and the last
    ones, so that agents' conversations, each of another shape, have shapes in common."""
    starts = [k for k in range(turn) if messages[k].role == "assistant"]
    if len(starts) <= _NUM_LAST_ROUNDS + 1:
        return range(turn + 1)
    return [*range(starts[1]), *range(starts[-_NUM_LAST_ROUNDS], turn + 1)]


def _shape_of(message: Message) -> Hashable:
    role, content = message.role, message.content
    has_content = bool(content) and not content.isspace()
    if role == "tool":
        return (role, has_content, bool(message.tool_call_id), bool(message.name))
    if message.reasoning or message.tool_calls:
        return (role, has_content, bool(message.reasoning.strip()), tuple(bool(call.id) for call in message.tool_calls))
    return role if has_content else (role,)


# --- The stand-in ----------------------------------------------------------------------------------------------------


def _word(number: int) -> str:
    """A word in no one's text, in alphabetical order; of 9 letters, as Mistral's templates want ids."""
    return "zq" + "".join("bcdfghjklm"[int(digit)] for digit in f"{number:06}") + "x"


def _stand_ins(messages: Sequence[Message], words: Iterator[str], is_full: bool) -> Iterator[Message]:
    calls: tuple[ToolCall, ...] = ()
    place = 0
    for message in messages:
        content, reasoning = (next(words) if text.strip() else text for text in (message.content, message.reasoning))
        call_id = name = ""
        own_calls = tuple(_call(words, is_full, bool(call.id)) for call in message.tool_calls)
        if message.role == "assistant":
            calls, place = own_calls, 0
        elif message.role == "tool":
            answered = calls[min(place, len(calls) - 1)] if calls else ToolCall(next(words), {}, "{}", next(words))
            call_id = answered.id if message.tool_call_id else ""
            name = answered.name if message.name else ""
            place += 1
        yield Message(message.role, content, reasoning, own_calls, call_id, name)


def _call(words: Iterator[str], is_full: bool, has_id: bool) -> ToolCall:
    name, call_id = next(words), next(words)
    values = [7351, 0, 83.25, True, False, None, [next(words), 4127], {next(words): next(words), next(words): 6203}]
    arguments = {next(words): value for value in [*(values if is_full else ()), next(words)]}
    return ToolCall(name, arguments, json.dumps(arguments), call_id if has_id else "")


def _schema(words: Iterator[str], is_full: bool, is_wrapped: bool) -> dict[str, Any]:
    properties: dict[str, Any] = {next(words): {"type": "string", "description": next(words)}}
    if is_full:
        properties[next(words)] = {"type": "string", "enum": [next(words), next(words)]}
        inner = {next(words): {"type": "integer", "description": next(words)}}
        properties[next(words)] = {"type": "object", "properties": inner}
    parameters = {"type": "object", "properties": properties, "required": [next(iter(properties))]}
    function = {"name": next(words), "description": next(words), "parameters": parameters}
    return {"type": "function", "function": function} if is_wrapped else function


# --- What its text lacks ---------------------------------------------------------------------------------------------


def _gaps_of_tools(tools: Sequence[dict[str, Any]], prompt: str) -> Iterator[Gap]:
    for tool in tools:
        function = tool.get("function", tool)
        if function["name"] not in prompt:
            yield Gap("the row's tools")
            return
        for part, words in _words_of(function).items():
            if not all(word in prompt for word in words):
                yield Gap(f"{part} of the row's tools", part=part)


def _words_of(function: dict[str, Any]) -> dict[str, list[str]]:
    """Texts of a schema, by what they are."""
    found: dict[str, list[str]] = {}
    if isinstance(function.get("description"), str):
        found["the description"] = [function["description"]]
    schemas = [(function.get("parameters"), "the parameters")]
    for schema, part in schemas:
        properties = schema.get("properties") if isinstance(schema, dict) else None
        for name, value in properties.items() if isinstance(properties, dict) else ():
            found.setdefault(part, []).append(name)
            if isinstance(value, dict):
                if isinstance(value.get("description"), str):
                    found.setdefault(f"descriptions of {part}", []).append(value["description"])
                if isinstance(value.get("enum"), list):
                    texts = [choice for choice in value["enum"] if isinstance(choice, str)]
                    found.setdefault(f"choices (enum) of {part}", []).extend(texts)
                schemas.append((value, "parameters within parameters"))
    return found


def _gaps_before(messages: Sequence[Message], prompt: str) -> Iterator[Gap]:
    calls: tuple[ToolCall, ...] = ()
    for k, message in enumerate(messages):
        if message.role == "assistant":
            if not message.tool_calls and message.content not in prompt:
                yield Gap("message {}, of role assistant, in the prompts after it", k)
            calls = message.tool_calls
            continue
        if message.content not in prompt:
            yield Gap(f"message {{}}, of role {message.role}", k)
        if message.role == "tool" and len(calls) > 1:
            marks = [mark for mark in (message.tool_call_id, message.name) if mark]
            if not any(prompt.count(mark) > 1 for mark in marks):  # once in the call
                yield Gap("which call is answered by message {}", k, _ORDER)


def _gaps_of_turn(message: Message, i: int, completion: str) -> Iterator[Gap]:
    if message.content not in completion:
        yield Gap("the content of message {}" + (", which calls tools" if message.tool_calls else ""), i)
    if message.reasoning not in completion:
        yield Gap("the reasoning of message {}", i)
    for c, call in enumerate(message.tool_calls):
        where = f"call {c + 1} of message {{}}"
        lost = [value for key, value in call.arguments.items() if not _holds_argument(completion, key, value, call)]
        if call.name not in completion:
            yield Gap(where, i)
        elif len(lost) == len(call.arguments):
            yield Gap(f"the arguments of {where}", i, _ANY, c)
        for value in lost:
            yield Gap(f"an argument that is {_kind_of(value)}, of {where}", i, _kind_of(value), c)


def _holds_argument(text: str, key: str, value: Any, call: ToolCall) -> bool:
    """Whether the value stands between its key and the next one."""
    _, found, after = text.partition(key)
    ends = [at for other in call.arguments if (at := after.find(other)) >= 0]
    return bool(found) and holds_value(after[: min(ends, default=len(after))], value)


def holds_value(text: str, value: Any) -> bool:
    """Whether a JSON value stands in the text, as JSON or as Python writes its scalars."""
    if isinstance(value, dict):
        return all(holds_value(text, item) for pair in value.items() for item in pair)
    if isinstance(value, list | tuple):
        return all(holds_value(text, item) for item in value)
    if isinstance(value, str):
        return holds_text(text, value)
    return json.dumps(value) in text or str(value) in text


def holds_text(text: str, part: str) -> bool:
    """Whether a template has written `part`, but for the whitespace around it and JSON's escapes."""
    part = part.strip()
    return part in text or json.dumps(part, ensure_ascii=False)[1:-1] in text or json.dumps(part)[1:-1] in text


# --- Whether a row loses it ------------------------------------------------------------------------------------------

_ANY = "any"
_ORDER = "results out of order"


def _has(gap: Gap, messages: Sequence[Message], tools: Sequence[dict[str, Any]]) -> bool:
    if gap.part == _ORDER:
        return _is_out_of_place(messages, gap.message)
    if gap.call >= 0:
        arguments = messages[gap.message].tool_calls[gap.call].arguments
        return bool(arguments) if gap.part == _ANY else gap.part in _kinds_in(arguments)
    functions = (tool.get("function", tool) for tool in tools)
    return any(isinstance(function, dict) and gap.part in _words_of(function) for function in functions)


def _kind_of(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, int | float):
        return "zero" if not value else "a whole number" if isinstance(value, int) else "a fraction"
    return "text" if isinstance(value, str) else "an object" if isinstance(value, dict) else "a list"


def _kinds_in(values: Any) -> Iterator[str]:
    """The kinds of what is in an object or a list, and in that."""
    for value in values.values() if isinstance(values, dict) else values:
        yield _kind_of(value)
        if isinstance(value, dict | list | tuple):
            yield from _kinds_in(value)


def _is_out_of_place(messages: Sequence[Message], i: int) -> bool:
    """Whether a result answers another call than its place among the results says."""
    caller = max((k for k in range(i) if messages[k].role == "assistant"), default=-1)
    calls = messages[caller].tool_calls if caller >= 0 else ()
    place = sum(message.role == "tool" for message in messages[caller + 1 : i])
    if place >= len(calls):
        return False
    result, call = messages[i], calls[place]
    if result.tool_call_id and call.id:
        return result.tool_call_id != call.id
    return bool(result.name) and result.name != call.name and result.name in [other.name for other in calls]
