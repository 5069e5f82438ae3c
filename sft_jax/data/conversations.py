"""A `RawRow` in, a `Conversation` or `Document` out; or a `RowError` whose reason is a line of the data report.

`formats.py` finds the turns of a row, `messages.py` reads each of them, and here stands the grammar of their order:

    conversation = (system)? (user (calls result+)* answer)+

An answer is an assistant turn; calls are one with tool_calls, and may be the last answer. Nothing is repaired: a row
outside this grammar is refused, because each repair would train on something that nobody wrote. The reasons are those
of `sft_jax/row_reasons.py`; a policy `keep` lets a row pass as it is described there.
"""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from sft_jax.data.formats import (
    TOOL_FIELDS,
    RawTurns,
    check_detected,
    detect_format,
    ignored_fields,
    read_fields,
    read_turns,
)
from sft_jax.data.messages import parse_message
from sft_jax.data.row_values import RowCheck, check_text, refuse
from sft_jax.data.tool_calls import OpenCalls, parse_tools
from sft_jax.datatypes import Conversation, Document, Message, RawRow

__all__ = ["check_detected", "detect_format", "ignored_fields", "parse_prompt", "parse_row"]

_NO_NAMES: dict[str, str] = {}
_NOTHING: frozenset[str] = frozenset()
# Roles that follow one another and should not. System messages are looked through, and an empty string is the start.
_REASON_OF_ORDER: dict[tuple[str, str], tuple[str, str]] = {
    ("", "assistant"): ("assistant_first", "is an assistant turn that answers nothing"),
    ("user", "user"): ("two_users", "is a user turn after a user turn"),
    ("assistant", "assistant"): ("two_assistants", "is an assistant turn after an assistant turn"),
    ("tool", "user"): ("unanswered_result", "is a user turn after a tool result"),
}


def parse_row(
    row: RawRow,
    format: str,
    role_map: Mapping[str, str] = _NO_NAMES,
    field_map: Mapping[str, str] = _NO_NAMES,
    keep: frozenset[str] = _NOTHING,
    kept: Counter[str] | None = None,
) -> Conversation | Document:
    """Check a row and give it its type.

    Args:
      format: a name in `FORMATS`; `auto` is decided from this row alone.
      role_map: the row's role -> system, user, assistant or tool; other roles stand for themselves.
      field_map: our name of a field -> the row's.
      keep: the reasons whose policy is `keep`.
      kept: counts the turns that these let pass, by reason; unchanged where the row is refused.

    Raises:
      RowError: what is wrong, under a reason in `row_reasons.REASONS`.
    """
    if format == "auto":
        format = detect_format(row, field_map)
    origin = row.origin
    fields = read_fields(row, format, field_map)
    if format == "text":
        text = check_text(fields["text"], "text", origin)
        if not text.strip():
            refuse("empty_text", origin, "text is empty")
        return Document(text, origin)

    check = RowCheck(origin, keep)
    messages, tools = _parse_turns(read_turns(fields, format, origin), role_map, check)
    if len(fields) > 1:
        tools = _join_tools(parse_tools(fields, TOOL_FIELDS, origin), tools, check)
    end = len(messages)
    while end and messages[end - 1].role != "assistant":
        end -= 1
    if not end:
        refuse("no_assistant_turn", origin, "has no assistant turn to train on")
    if end < len(messages):
        # An untrained tail is a sign of a cut conversation; dropping it unasked would be a repair.
        problem = f"ends with a {messages[-1].role} turn that nothing answers"
        check.allow("ends_without_assistant", problem, len(messages) - end)
        del messages[end:]
    if check.kept and kept is not None:
        kept.update(check.kept)
    return Conversation(tuple(messages), origin, tools)


def parse_prompt(row: RawRow, role_map: Mapping[str, str] = _NO_NAMES) -> Conversation:
    """The messages and tools of a row of messages or conversations; unlike a demonstration, it may end with any role.

    Raises:
      RowError: as `parse_row`.
    """
    format = "sharegpt" if not row.fields.keys().isdisjoint({"conversations", "conversation"}) else "messages"
    check = RowCheck(row.origin)
    fields = read_fields(row, format)
    messages, tools = _parse_turns(read_turns(fields, format, row.origin), role_map, check)
    tools = _join_tools(parse_tools(fields, TOOL_FIELDS, row.origin), tools, check)
    return Conversation(tuple(messages), row.origin, tools)


def _parse_turns(
    raw: RawTurns, role_map: Mapping[str, str], check: RowCheck
) -> tuple[list[Message], tuple[dict[str, Any], ...]]:
    """The messages of a row in a lawful order, and the tools that they offer."""
    messages: list[Message] = []
    tools: tuple[dict[str, Any], ...] = ()
    last_role = ""
    calls: OpenCalls | None = None
    for i, value in enumerate(raw.turns):
        where = raw.labels[i]
        message, offered = parse_message(value, where, raw.roles, role_map, check)
        if offered:
            tools = _join_tools(tools, offered, check)
        role = message.role
        if role == "assistant" and i < raw.num_context:
            message = _as_context(message, where, check)
        messages.append(message)
        if role == "system":
            if i:
                check.allow("system_not_first", f"{where} is a system message; it comes first and once")
            continue
        if role == "tool":
            _check_result(message, calls, where, check)
        else:
            if calls and not calls.all_answered:
                problem = f"{where} comes before the {calls.num_open} open calls of {calls.where} have their results"
                check.allow("unanswered_call", problem)
            calls = OpenCalls(message.tool_calls, where) if message.tool_calls else None
            if (last_role, role) in _REASON_OF_ORDER:
                reason, what = _REASON_OF_ORDER[last_role, role]
                check.allow(reason, f"{where} {what}")
        last_role = role
    return messages, tools


def _check_result(message: Message, calls: OpenCalls | None, where: str, check: RowCheck) -> None:
    if calls is None:
        check.allow("tool_without_call", f"{where} is a tool result, and the turn before it has no tool_calls")
        return
    reason = calls.answer(message.tool_call_id)
    if reason == "wrong_call_id":
        check.allow(reason, f"{where} has a tool_call_id that is of no open call of {calls.where}")
    elif reason:
        check.allow(reason, f"{where} is a tool result, and the calls of {calls.where} all have theirs")


def _as_context(message: Message, where: str, check: RowCheck) -> Message:
    """An assistant turn that is not trained on."""
    if message.loss_weight:
        check.allow("weight_on_context", f"{where} is part of the prompt and has a weight above 0")
    return message._replace(loss_weight=0.0)


def _join_tools(
    one: tuple[dict[str, Any], ...], other: tuple[dict[str, Any], ...], check: RowCheck
) -> tuple[dict[str, Any], ...]:
    if one and other:
        refuse("conflicting_fields", check.origin, "offers tools in two places; expected one")
    return one or other
