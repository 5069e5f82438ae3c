"""One message as a row writes it -> a `Message`, each of its fields read or refused: a template sees all of them.

    {"role": "assistant", "content": [{"type": "reasoning", "text": "6 and 1."}, {"type": "text", "text": "Seven."}]}
    {"from": "gpt", "value": "Seven.", "loss_weight": 0.5}                     in ShareGPT's names

Text parts are joined with nothing between them. Parts stand in the order in which a turn is written: reasoning, text,
calls. Which fields a turn may have depends on its role:

    any         role, content; weight, train, loss_weight (a context turn's weight is 0, or refused)
    system      a content part of type `tools`
    assistant   tool_calls or function_call; reasoning_content, reasoning or thinking (the same)
    tool        tool_call_id, name
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sft_jax.data.row_values import RowCheck, check_text, is_absent, kind, list_names, refuse, show_name
from sft_jax.data.tool_calls import parse_calls, parse_tool_list, parse_written_calls
from sft_jax.datatypes import Message, Origin, ToolCall

ROLES = ("system", "user", "assistant", "tool")
_CALL = "function_call"  # ShareGPT's role of an assistant turn whose content is its calls
OPENAI_ROLES: dict[str, str] = {role: role for role in ROLES} | {"developer": "system", "function": "tool"}
SHAREGPT_ROLES: dict[str, str] = (
    OPENAI_ROLES
    | {"human": "user", "gpt": "assistant", "model": "assistant", "bot": "assistant"}
    | {"observation": "tool", _CALL: _CALL}
)
MAX_LOSS_WEIGHT = 1_000_000
"""The sum over a batch stays well inside float32."""

_WEIGHTS = ("weight", "train", "loss_weight")
_REASONING = ("reasoning_content", "reasoning", "thinking")
_FIELDS_OF_ROLE: dict[str, tuple[str, ...]] = {
    "system": (),
    "user": (),
    "assistant": ("tool_calls", "function_call", *_REASONING),
    "tool": ("tool_call_id", "name"),
}
_MAY_HAVE = {role: frozenset({"role", "content", *_WEIGHTS, *names}) for role, names in _FIELDS_OF_ROLE.items()}
_KNOWN_FIELDS = frozenset().union(*_MAY_HAVE.values())
_TEXTS = frozenset({*_REASONING, "tool_call_id", "name"})
_PARTS: dict[str, str] = {
    "text": "text",
    "reasoning": "reasoning", "thinking": "reasoning",
    "tool_call": "calls", "tool_calls": "calls",
    "tools": "tools",
}  # fmt: skip
_OWNERS = {"reasoning": "assistant", "calls": "assistant", "tools": "system"}
_PART_ORDER = {"tools": 0, "reasoning": 1, "text": 2, "calls": 3}
_MEDIA = ("image", "audio", "video", "file", "input_image", "input_audio", "input_file")


def parse_message(
    value: Any, where: str, roles: Mapping[str, str], role_map: Mapping[str, str], row: RowCheck
) -> tuple[Message, tuple[dict[str, Any], ...]]:
    """The message, and the tools that it offers in a part of its own.

    Args:
      where: how messages of errors name it.
      roles: names of roles -> system, user, assistant, tool or function_call.
      role_map: the row's names -> names in `roles`; read first.

    Raises:
      RowError: what is wrong.
    """
    if not isinstance(value, dict):
        refuse("message_not_an_object", row.origin, f"{where} is {kind(value)}; expected an object")
    if roles is SHAREGPT_ROLES and "from" in value:
        value = _rename(value, where, row.origin)
    name, content = value.get("role"), value.get("content")
    role = roles.get(name) if type(name) is str and not role_map else None  # of most messages, and quick
    role = role or _parse_role(value, where, roles, role_map, row.origin)
    tools: tuple[dict[str, Any], ...] = ()
    if len(value) == 2 and type(content) is str and role != _CALL:
        message = Message(role, content)
    else:
        message, tools = _parse_fields(value, role, where, row)
    if not message.content or message.content.isspace():
        if message.role == "user":
            row.allow("empty_content", f"{where} is a user turn without content")
        elif message.role == "assistant" and not message.tool_calls:
            besides = ", reasoning apart" if message.reasoning else ""
            row.allow("empty_assistant", f"{where} is an assistant turn without content{besides}")
    return message, tools


def _rename(value: dict[str, Any], where: str, origin: Origin) -> dict[str, Any]:
    """ShareGPT's names in OpenAI's."""
    both = {"role", "content"} & value.keys()
    if not all(is_absent(value[name]) for name in both):
        refuse("conflicting_fields", origin, f"{where} sets {list_names(both | {'from', 'value'} & value.keys())}")
    renamed = {"from": "role", "value": "content"}
    return {renamed.get(name, name): item for name, item in value.items() if name not in both}


def _parse_role(
    value: dict[str, Any], where: str, roles: Mapping[str, str], role_map: Mapping[str, str], origin: Origin
) -> str:
    role = value.get("role")
    if type(role) is str:
        mapped = role_map.get(role, role) if role_map else role
        if mapped in roles:
            return roles[mapped]
        shown = f"{role[:40]!r}" if mapped == role else f"{role[:40]!r}, mapped to {mapped!r}"
        problem = f"{where} has role {shown}; expected system, user, assistant or tool"
        refuse("unknown_role", origin, problem)
    if "role" not in value:
        named = {"from", "value"} & value.keys()
        mend = "Set the source's format to sharegpt, and its fields to dict(conversations='messages')" if named else ""
        refuse("missing_role", origin, f"{where} has the fields {list_names(value)} and no role", mend)
    refuse("unknown_role", origin, f"{where} has a role that is {kind(role)}; expected system, user, assistant or tool")


def _parse_fields(
    value: dict[str, Any], role: str, where: str, row: RowCheck
) -> tuple[Message, tuple[dict[str, Any], ...]]:
    """A message that has more than a role and text."""
    origin = row.origin
    written = role == _CALL
    role = "assistant" if written else role
    given = {name: item for name, item in value.items() if name in ("role", "content") or not is_absent(item)}
    _check_fields(given, role, where, origin)

    content = _Content()
    if written:
        content.calls = parse_written_calls(given.get("content"), f"{where} call", origin)
    elif given.get("content") is not None:
        content = _parse_content(given["content"], role, where, origin)
    calls = _parse_calls(given, content.calls, where, origin)
    if given.get("content") is None and not calls:
        if "content" in given:
            refuse("content_not_text", origin, f"{where} content is null; expected a string")
        refuse("missing_content", origin, f"{where} has the fields {list_names(value)} and no content")
    texts = {
        name: check_text(given[name], f"{where} {name}", origin, "field_not_text") for name in given if name in _TEXTS
    }
    message = Message(
        role,
        content.text,
        _parse_reasoning(texts, content.reasoning, where, origin),
        calls,
        texts.get("tool_call_id", ""),
        texts.get("name", ""),
        _parse_weight(given, role, where, row),
    )
    return message, content.tools


def _check_fields(given: Mapping[str, Any], role: str, where: str, origin: Origin) -> None:
    """Refuse the fields that are not read, or not on this role."""
    if given.keys() <= _MAY_HAVE[role]:
        return
    unknown = given.keys() - _KNOWN_FIELDS
    if unknown:
        problem = f"{where} sets {list_names(unknown)}, which is not read and a template could show"
        refuse("unsupported_field", origin, problem)
    strange = given.keys() - _MAY_HAVE[role]
    refuse("field_of_another_role", origin, f"{where}, of role {role}, sets {list_names(strange)}")


@dataclass(slots=True)
class _Content:
    """What the parts of a content come to."""

    text: str = ""
    reasoning: str = ""
    calls: tuple[ToolCall, ...] = ()
    tools: tuple[dict[str, Any], ...] = ()


def _parse_content(value: Any, role: str, where: str, origin: Origin) -> _Content:
    if isinstance(value, str):
        return _Content(value)
    if not isinstance(value, list):
        refuse("content_not_text", origin, f"{where} content is {kind(value)}; expected a string, or a list of parts")
    last = ""
    found: dict[str, list[Any]] = {"tools": [], "reasoning": [], "text": [], "calls": []}
    for i, part in enumerate(value):
        place = f"{where} content[{i}]"
        name, item = _parse_part(part, place, origin)
        if role != _OWNERS.get(name, role):
            problem = f"{place} is a part of type {show_name(part['type'])} on a {role} turn"
            refuse("field_of_another_role", origin, problem)
        if last and _PART_ORDER[name] < _PART_ORDER[last]:
            problem = f"{place} is {name} after {last}; a turn is written as reasoning, text, calls"
            refuse("bad_part", origin, problem)
        last = name
        if name == "tools":
            found[name] += parse_tool_list(item, place, origin)
        elif name == "calls":
            found[name] += parse_written_calls(item, place, origin)
        else:
            found[name].append(check_text(item, place, origin, "bad_part"))
    text, reasoning = "".join(found["text"]), "".join(found["reasoning"])
    return _Content(text, reasoning, tuple(found["calls"]), tuple(found["tools"]))


def _parse_part(part: Any, where: str, origin: Origin) -> tuple[str, Any]:
    """What a part is (text, reasoning, calls or tools), and its value: the one field beside its type."""
    if not isinstance(part, dict):
        refuse("bad_part", origin, f"{where} is {kind(part)}; expected an object with type and text")
    type_ = part.get("type")
    if not isinstance(type_, str):
        refuse("bad_part", origin, f"{where} has the fields {list_names(part)} and no type that is a string")
    if type_.removesuffix("_url") in _MEDIA:
        refuse("needs_media", origin, f"{where} is a part of type {type_}; text alone is read")
    if type_ not in _PARTS:
        refuse("bad_part", origin, f"{where} is a part of the unknown type {show_name(type_)}")
    names = [name for name in part if name != "type" and part[name] is not None]
    known = ("value", "text", type_) if _PARTS[type_] in ("text", "reasoning") else ("value", type_)
    others = [name for name in names if name not in known]
    if others:
        refuse("unsupported_field", origin, f"{where} sets {list_names(others)}, which is not read")
    if len(names) != 1:
        problem = f"{where} has the fields {list_names(part)}; expected type and one of {list_names(known)}"
        refuse("bad_part", origin, problem)
    return _PARTS[type_], part[names[0]]


def _parse_calls(
    given: Mapping[str, Any], in_parts: tuple[ToolCall, ...], where: str, origin: Origin
) -> tuple[ToolCall, ...]:
    found = [name for name in ("tool_calls", "function_call") if name in given]
    if len(found) + bool(in_parts) > 1:
        places = list_names([*found, "content"] if in_parts else found)
        refuse("conflicting_fields", origin, f"{where} has calls in {places}; expected them in one place")
    calls = in_parts
    if found:
        value = given[found[0]] if found[0] == "tool_calls" else [given[found[0]]]
        calls = parse_calls(value, f"{where} {found[0]}", origin)
    ids = [call.id for call in calls if call.id]
    if len(ids) > 1 and len(set(ids)) < len(ids):
        refuse("duplicate_call_id", origin, f"{where} has two calls with one id")
    return calls


def _parse_reasoning(texts: Mapping[str, str], in_parts: str, where: str, origin: Origin) -> str:
    found = {texts[name] for name in _REASONING if name in texts} | ({in_parts} - {""})
    if len(found) > 1:
        refuse("conflicting_fields", origin, f"{where} has reasoning in two places, and they differ")
    return next(iter(found), "")


def _parse_weight(given: Mapping[str, Any], role: str, where: str, row: RowCheck) -> float | None:
    """The weight of an assistant turn; None where the row gives none, or to another turn 0."""
    if given.keys().isdisjoint(_WEIGHTS):
        return None
    weights = {name: _check_weight(name, given[name], where, row.origin) for name in _WEIGHTS if name in given}
    if len(set(weights.values())) > 1:
        refuse("conflicting_fields", row.origin, f"{where} sets {list_names(weights)}, and they differ")
    weight = next(iter(weights.values()), None)
    if role == "assistant":
        return weight
    if weight:
        problem = f"{where}, of role {role}, sets {list_names(weights)} above 0; answers alone have weights"
        row.allow("weight_on_context", problem)
    return None


def _check_weight(name: str, value: Any, where: str, origin: Origin) -> float:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if name == "train":
        good, expected = isinstance(value, bool), "true or false"
    elif name == "weight":
        good, expected = is_number and value in (0, 1), "0 or 1"
    else:
        good, expected = is_number and 0 <= value <= MAX_LOSS_WEIGHT, f"a number from 0 to {MAX_LOSS_WEIGHT:,}"
    if not good:
        found = "another number" if is_number and name != "train" else kind(value)
        refuse("bad_weight", origin, f"{where} {name} is {found}; expected {expected}")
    return float(value)
