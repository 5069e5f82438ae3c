"""A `RawRow` in, a `Conversation` or `Document` out; or a `RowError` whose reason is a line of the data report.

Three formats:

    messages           {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]}
    prompt_completion  {"prompt": "Hi", "completion": "Hello."}       one user turn and one assistant turn
    text               {"text": "Once upon a time"}                   a document: every token is trained on

A conversation is (system)? (user (assistant tool+)* assistant)+. Nothing is repaired: a row outside this grammar is
refused, because each repair would train on something that nobody wrote.
"""

from collections.abc import Mapping, Set
from typing import Any, NoReturn

from sft_jax.data.errors import RowError
from sft_jax.datatypes import Conversation, Document, Message, Origin, RawRow

FORMAT_FIELDS: dict[str, frozenset[str]] = {
    "messages": frozenset({"messages"}),
    "prompt_completion": frozenset({"prompt", "completion"}),
    "text": frozenset({"text"}),
}
ROLES = ("system", "user", "assistant", "tool")
# Fields beside a row's own that other trainers obey; a row that sets one would not train as its author meant. Any other
# field is ignored, and counted in the data report.
UNSUPPORTED_FIELDS = frozenset(
    {"chat_template", "chat_template_kwargs", "documents", "functions", "history", "system", "tools"}
    | {"loss_weight", "loss_weights", "weight"}
    | {"audio", "audios", "image", "images", "video", "videos"}
)
_NEXT_ROLES: dict[str, tuple[str, ...]] = {
    "": ("system", "user"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),
}
_NO_ROLES: dict[str, str] = {}


def detect_format(row: RawRow) -> str:
    """The format whose fields the row has.

    Raises:
      RowError: `wrong_format` where it has those of none, or of several.
    """
    found = [name for name, fields in FORMAT_FIELDS.items() if fields <= row.fields.keys()]
    if len(found) == 1:
        return found[0]
    if found:
        problem = (
            f"may be read as {' or '.join(found)}. Choose with the source's format, as in config.data.train[0].format"
        )
        raise RowError("wrong_format", row.origin, f"{problem}.")
    raise RowError(
        "wrong_format",
        row.origin,
        f"has the fields {_list(row.fields)}; expected messages, or prompt and completion, or text. Rename them.",
    )


def parse_row(row: RawRow, format: str, role_map: Mapping[str, str] = _NO_ROLES) -> Conversation | Document:
    """Check a row and give it its type.

    Args:
      format: messages, prompt_completion or text; `auto` is decided from this row alone.
      role_map: the row's role -> system, user, assistant or tool; other roles stand for themselves.

    Raises:
      RowError: what is wrong, under one of the reasons in this file.
    """
    if format == "auto":
        format = detect_format(row)
    fields, origin = row.fields, row.origin
    missing = FORMAT_FIELDS[format] - fields.keys()
    if missing:
        problem = f"has the fields {_list(fields)} and no {_list(missing)}, which the format {format} needs"
        raise RowError("wrong_format", origin, f"{problem}. Fix the row, or move it to a source of its own format.")
    unsupported = sorted(name for name in UNSUPPORTED_FIELDS & fields.keys() if not _is_empty(fields[name]))
    if unsupported:
        raise RowError("unsupported_field", origin, f"sets {_list(unsupported)}: not supported yet. Remove the field.")

    if format == "text":
        text = _check_text(fields["text"], "text", origin)
        if not text.strip():
            raise RowError("empty_text", origin, "text is empty. Remove the row.")
        return Document(text, origin)
    if format == "prompt_completion":
        prompt = _check_text(fields["prompt"], "prompt", origin)
        completion = _check_text(fields["completion"], "completion", origin)
        if not completion.strip():
            raise RowError("empty_assistant", origin, "completion is empty. Remove the row, or write the completion.")
        return Conversation((Message("user", prompt), Message("assistant", completion)), origin)

    messages = parse_messages(row, role_map)
    if not any(message.role == "assistant" for message in messages):
        raise RowError("no_assistant_turn", origin, "has no assistant turn to train on. Add the answer, or remove it.")
    if messages[-1].role != "assistant":
        # An untrained tail is a sign of a cut conversation; dropping it would be a repair.
        problem = f"ends with a {messages[-1].role} turn that nothing answers"
        raise RowError("ends_without_assistant", origin, f"{problem}. Remove that turn, or add the answer.")
    return Conversation(messages, origin)


def parse_messages(row: RawRow, role_map: Mapping[str, str] = _NO_ROLES) -> tuple[Message, ...]:
    """The messages of a row, each checked and in a lawful order; unlike a demonstration, they may end with any role.

    Raises:
      RowError: as `parse_row`.
    """
    origin = row.origin
    if "messages" not in row.fields:
        raise RowError("wrong_format", origin, f"has the fields {_list(row.fields)}; expected messages. Rename it.")
    values = row.fields["messages"]
    if not isinstance(values, list):
        raise RowError("messages_not_a_list", origin, f"messages is {_kind(values)}; expected a list. Fix the row.")
    if not values:
        raise RowError("empty_conversation", origin, "messages is an empty list. Remove the row.")
    messages: list[Message] = []
    last_role = ""
    for number, value in enumerate(values, start=1):
        message = _parse_message(value, number, role_map, origin)
        if message.role not in _NEXT_ROLES[last_role]:
            _refuse_order(message.role, last_role, number, origin)
        messages.append(message)
        last_role = message.role
    return tuple(messages)


def ignored_fields(row: RawRow, format: str) -> Set[str]:
    """The fields that `parse_row` does not read; they are counted in the data report."""
    return row.fields.keys() - FORMAT_FIELDS[format]


def _parse_message(value: Any, number: int, role_map: Mapping[str, str], origin: Origin) -> Message:
    """One message; `number` counts from 1, as people do."""
    where = f"message {number}"
    if not isinstance(value, dict):
        problem = f"{where} is {_kind(value)}; expected an object with role and content"
        raise RowError("message_not_an_object", origin, f"{problem}. Fix the row.")
    for name in ("role", "content"):
        if name not in value:
            problem = f"{where} has the fields {_list(value)} and no {name}"
            raise RowError(f"missing_{name}", origin, f"{problem}. Fix the row.")
    role = value["role"]
    mapped = role_map.get(role, role) if isinstance(role, str) else role
    if mapped not in ROLES:
        shown = f"{role!r}" if mapped == role else f"{role!r}, mapped to {mapped!r}"
        problem = f"{where} has role {shown}; expected system, user, assistant or tool"
        raise RowError("unknown_role", origin, f"{problem}. Fix the row, or map it with config.data.role_map.")
    # Chat templates see every field of a message, so unlike a row's, none may be ignored.
    unsupported = sorted(name for name in value.keys() - {"role", "content"} if not _is_empty(value[name]))
    if unsupported:
        problem = f"{where} sets {_list(unsupported)}: not supported yet"
        raise RowError("unsupported_field", origin, f"{problem}. Remove the field.")
    content = _check_text(value["content"], f"{where} content", origin)
    if mapped == "assistant" and not content.strip():
        problem = f"{where} is an assistant turn with no content"
        raise RowError("empty_assistant", origin, f"{problem}. Remove the row, or write the answer.")
    return Message(mapped, content)


def _refuse_order(role: str, last_role: str, number: int, origin: Origin) -> NoReturn:
    if role == "system":
        problem = f"message {number} has role 'system'; a system message comes first and once"
        raise RowError("system_not_first", origin, f"{problem}. Move it to the front.")
    place = f"after {last_role!r}" if last_role else "at the start"
    expected = " or ".join(_NEXT_ROLES[last_role])
    problem = f"message {number} has role {role!r} {place}; expected {expected}"
    raise RowError("role_order", origin, f"{problem}. Merge or reorder the turns.")


def _check_text(value: Any, where: str, origin: Origin) -> str:
    if not isinstance(value, str):
        raise RowError("content_not_text", origin, f"{where} is {_kind(value)}; expected a string. Fix the row.")
    return value


def _is_empty(value: Any) -> bool:
    """Null, or an empty string, list or object, as exporters write for absent fields; 0 and false are values."""
    return value is None or (isinstance(value, str | list | dict) and not value)


def _kind(value: Any) -> str:
    """JSON's name of a value's type, never the value: messages stand in logs."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def _list(names: Any) -> str:
    return ", ".join(sorted(names)) or "nothing"
