"""The calls and the schemas of tools, as rows write them -> `ToolCall`s, and schemas exactly as given.

A call is OpenAI's {"id", "type": "function", "function": {"name", "arguments"}} or the bare {"name", "arguments"};
arguments are a JSON object or the text of one.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sft_jax.data.row_values import is_absent, kind, list_names, parse_json, refuse, write_json
from sft_jax.datatypes import Origin, ToolCall

_OPENAI_FIELDS = frozenset({"id", "type", "function"})
_BARE_FIELDS = frozenset({"id", "type", "name", "arguments"})
_FUNCTION_FIELDS = frozenset({"name", "arguments"})


def parse_calls(value: Any, where: str, origin: Origin) -> tuple[ToolCall, ...]:
    """The calls of a turn.

    Args:
      value: a list of calls.
      where: how messages name it, such as `message 3 tool_calls`.

    Raises:
      RowError: `bad_tool_call`, `blank_tool_name`, `call_arguments_not_json`, `call_arguments_not_an_object`,
        `field_not_text`, `unsupported_field`.
    """
    if not isinstance(value, list):
        refuse("bad_tool_call", origin, f"{where} is {kind(value)}; expected a list of calls")
    return tuple(_parse_call(call, f"{where}[{i}]", origin) for i, call in enumerate(value))


def parse_written_calls(value: Any, where: str, origin: Origin) -> tuple[ToolCall, ...]:
    """The calls of a turn that holds one call or a list of them, as JSON or as the text of it."""
    if isinstance(value, str):
        try:
            value = parse_json(value)
        except ValueError as error:
            refuse("bad_tool_call", origin, f"{where} is a call that is not JSON: {error}")
    calls = value if isinstance(value, list) else [value]
    if not calls:
        refuse("bad_tool_call", origin, f"{where} is an empty list; expected at least one call")
    return parse_calls(calls, where, origin)


def parse_tools(fields: Mapping[str, Any], names: Iterable[str], origin: Origin) -> tuple[dict[str, Any], ...]:
    """The schemas in that one of the fields `names` which is there: a list of objects, or the text of one.

    Raises:
      RowError: `bad_tools`, `conflicting_fields`.
    """
    given = [name for name in names if not is_absent(fields.get(name))]
    if not given:
        return ()
    if len(given) > 1:
        refuse("conflicting_fields", origin, f"sets {list_names(given)}; one of them is read")
    return parse_tool_list(fields[given[0]], given[0], origin)


def parse_tool_list(value: Any, where: str, origin: Origin) -> tuple[dict[str, Any], ...]:
    """The schemas of `value`, each object as it stands: no key is added, left out or moved."""
    if isinstance(value, str):
        if not value.strip():
            return ()
        try:
            value = parse_json(value)
        except ValueError as error:
            refuse("bad_tools", origin, f"{where} is a string that is not JSON: {error}")
    if value is None:
        return ()
    if not isinstance(value, list):
        refuse("bad_tools", origin, f"{where} is {kind(value)}; expected a list of schemas")
    for i, tool in enumerate(value):
        if not isinstance(tool, dict):
            refuse("bad_tools", origin, f"{where}[{i}] is {kind(tool)}; expected an object")
    return tuple(value)


class OpenCalls:
    """The calls of an assistant turn that wait for their results.

    A result with an id answers the call of that id; one without answers any. A single result without an id may stand
    for all of a turn's calls, as some sets write them.
    """

    def __init__(self, calls: Sequence[ToolCall], where: str):
        self.where = where
        self.ids = {call.id for call in calls if call.id}
        self.num_open = len(calls)
        self._has_ids = bool(self.ids)
        self._num_results = 0

    def answer(self, call_id: str) -> str:
        """Take a result. Returns the reason for which it is none of these calls', or an empty string."""
        reason = ""
        if call_id and call_id not in self.ids:
            reason = "wrong_call_id"
        elif not self.num_open:
            reason = "tool_without_call"
        self.ids.discard(call_id)
        self.num_open = max(self.num_open - 1, 0)
        self._num_results += 1
        return reason

    @property
    def all_answered(self) -> bool:
        return not self.num_open or (self._num_results == 1 and not self._has_ids)


def _parse_call(call: Any, where: str, origin: Origin) -> ToolCall:
    if not isinstance(call, dict):
        refuse("bad_tool_call", origin, f"{where} is {kind(call)}; expected an object with name and arguments")
    function, known = call, _BARE_FIELDS
    if "function" in call:
        function, known = call["function"], _OPENAI_FIELDS
        if not isinstance(function, dict):
            refuse("bad_tool_call", origin, f"{where} function is {kind(function)}; expected an object")
        _refuse_others(function, _FUNCTION_FIELDS, f"{where} function", origin)
    _refuse_others(call, known, where, origin)
    if not is_absent(call.get("type")) and call["type"] != "function":
        refuse("bad_tool_call", origin, f"{where} has a type other than 'function'")
    call_id = call.get("id")
    if call_id is not None and not isinstance(call_id, str):
        refuse("field_not_text", origin, f"{where} id is {kind(call_id)}; expected a string")
    for name in ("name", "arguments"):
        if name not in function:
            refuse("bad_tool_call", origin, f"{where} has the fields {list_names(function)} and no {name}")
    name = function["name"]
    if not isinstance(name, str):
        refuse("bad_tool_call", origin, f"{where} name is {kind(name)}; expected a string")
    if not name.strip():
        refuse("blank_tool_name", origin, f"{where} has a blank name")
    return ToolCall(name, *_parse_arguments(function["arguments"], f"{where} arguments", origin), call_id or "")


def _parse_arguments(value: Any, where: str, origin: Origin) -> tuple[dict[str, Any], str]:
    """The arguments, and their JSON text: the row's own where it has one."""
    try:
        arguments = parse_json(value) if isinstance(value, str) else value
        text = value if isinstance(value, str) else write_json(value)
    except ValueError as error:
        refuse("call_arguments_not_json", origin, f"{where} cannot be read as JSON: {error}")
    if not isinstance(arguments, dict):
        expected = "expected an object, or the JSON text of one"
        refuse("call_arguments_not_an_object", origin, f"{where} is {kind(arguments)}; {expected}")
    return arguments, text


def _refuse_others(value: Mapping[str, Any], known: frozenset[str], where: str, origin: Origin) -> None:
    others = [name for name in value.keys() - known if not is_absent(value[name])]
    if others:
        refuse("unsupported_field", origin, f"{where} sets {list_names(others)}, which no template is shown")
