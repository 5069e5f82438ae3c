"""A row's fields -> the turns that it writes, by format; what a turn says is read by `messages.py`.

    messages           {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]}
    sharegpt           {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]}
    alpaca             {"instruction": "Add.", "input": "1 and 2", "output": "3", "history": [["Hi", "Hello."]]}
    prompt_completion  {"prompt": "Hi", "completion": "Hello."}       or messages, in either names, for each of them
    text               {"text": "Once upon a time"}                   a document: trained as a whole

The first four may have `tools` (or `functions`) and `system`, which becomes the first message. Alpaca's user turn is
instruction + "\\n" + input, or the one of them that is not empty; the answers of its history are trained on. The
messages of a prompt are context: an assistant turn among them has weight 0.

Rows with other fields are read through a source's `fields`, which gives ours the row's: dict(prompt="question",
completion="answer"). Dots lead into objects and lists: dict(input="instances.0.input"). A field that is mapped is not
looked at under its own name.
"""

from collections.abc import Mapping, Set
from typing import Any, NamedTuple

from sft_jax.data.messages import OPENAI_ROLES, SHAREGPT_ROLES
from sft_jax.data.row_values import check_text, is_absent, kind, list_names, refuse
from sft_jax.datatypes import Origin, RawRow
from sft_jax.row_formats import FORMATS

_NO_FIELDS: dict[str, str] = {}
_NEEDED = frozenset().union(*(needs for format in FORMATS.values() for needs in format.needs))
TOOL_FIELDS = ("tools", "functions")
_MEDIA = frozenset({"audio", "audios", "image", "images", "video", "videos"})
UNSUPPORTED_FIELDS = _MEDIA | {
    "chat_template", "chat_template_kwargs", "documents", "loss_weight", "loss_weights", "weight", "train", "kto_tag",
}  # fmt: skip
"""Fields beside a row's own that other trainers obey; a row that sets one would not train as its author meant. So are
those that another format reads. Any other field is ignored, and counted in the data report."""
_OF_SOME_FORMATS = frozenset({*TOOL_FIELDS, "system", "history"})
_OF_OTHERS = {name: _NEEDED - format.reads for name, format in FORMATS.items()}
_UNREAD = {name: UNSUPPORTED_FIELDS | (_OF_SOME_FORMATS - format.reads) for name, format in FORMATS.items()}

# Shapes that hold no demonstration as they are: the fields of each, the reason, and what its message says.
_KNOWN_SHAPES: tuple[tuple[frozenset[str], str, str, str], ...] = (
    (
        frozenset({"conversations", "chosen", "rejected"}),
        "preference_pair",
        "is a preference pair, which is no demonstration",
        "Name the answer to train on: fields=dict(prompt='conversations', completion='chosen')",
    ),
    (
        frozenset({"prompt", "chosen", "rejected"}),
        "preference_pair",
        "is a preference pair, which is no demonstration",
        "Name the answer to train on: fields=dict(completion='chosen')",
    ),
    (
        frozenset({"chosen", "rejected"}),
        "preference_pair",
        "is a preference pair, which is no demonstration",
        "Name the conversation to train on, if each is a list of messages: fields=dict(messages='chosen')",
    ),
    (
        frozenset({"question", "response_j", "response_k"}),
        "preference_pair",
        "is a preference pair, which is no demonstration",
        "Name the answer to train on: fields=dict(prompt='question', completion='response_j')",
    ),
    (
        frozenset({"message_tree_id", "prompt"}),
        "conversation_tree",
        "is a tree of replies, in which each path is another conversation",
        "Write a row for each path to train on, or name one reply: fields=dict(prompt='prompt.text', "
        "completion='prompt.replies.0.text')",
    ),
    (
        frozenset({"instruction", "instances"}),
        "wrong_format",
        "has its inputs and outputs in a list of instances",
        "Name one: fields=dict(input='instances.0.input', output='instances.0.output')",
    ),
    (
        frozenset({"question", "function"}),
        "wrong_format",
        "asks a question with tools and has no answer: it evaluates calls",
        "Add the answers, or remove the source",
    ),
    (
        frozenset({"question", "involved_classes"}),
        "wrong_format",
        "asks questions and has no answers: it evaluates calls",
        "Add the answers, or remove the source",
    ),
    (frozenset({"ground_truth"}), "wrong_format", "has answers without their questions", "Join the two files"),
    (
        frozenset({"name", "parameters"}),
        "wrong_format",
        "is the schema of a tool",
        "Put it in the tools of the rows that use it",
    ),
    (
        frozenset({"instruction", "response"}),
        "wrong_format",
        "has the fields instruction and response, and no output",
        "Name it: fields=dict(output='response')",
    ),
    (
        frozenset({"question", "answer"}),
        "wrong_format",
        "has the fields question and answer, of no format",
        "Name them: fields=dict(prompt='question', completion='answer')",
    ),
)
_WORSE_ANSWERS = frozenset({"rejected", "response_k"})


class RawTurns(NamedTuple):
    """The turns of a row as it writes them. `labels[i]` is how messages of errors name turn i."""

    turns: list[Any]
    labels: tuple[str, ...]
    num_context: int
    """So many turns, the first ones, are context: an assistant turn among them is not trained on."""
    roles: dict[str, str]


def detect_format(row: RawRow, field_map: Mapping[str, str] = _NO_FIELDS) -> str:
    """The format whose fields the row has.

    A `text` that contains the row's prompt and answer is their rendering, and does not count.

    Raises:
      RowError: `wrong_format` where it has those of none, or of several; another reason for what is no demonstration.
    """
    fields = map_fields(row, field_map)
    lost = [name for name in field_map if name in _NEEDED and name not in fields]
    if lost:
        problem = f"has the fields {list_names(row.fields)} and no {list_names(field_map[name] for name in lost)}"
        problem += f", which the source's fields give as {', '.join(lost)}"
        refuse("wrong_format", row.origin, problem, "Fix the row, or name the right field there")
    given = {name for name, value in fields.items() if value is not None} or fields.keys()
    found = _formats_of(given) or _formats_of(fields.keys())
    _refuse_pairs(fields, row.origin)
    if len(found) == 2 and found[1] == "text" and _is_rendering(fields, found[0]):
        found = found[:1]
    if len(found) == 1:
        return found[0]
    if found:
        problem = f"may be read as {' or '.join(found)}"
        mend = "Choose with the source's format, as in config.data.train[0].format"
        refuse("wrong_format", row.origin, problem, mend)
    for shape, reason, problem, mend in _KNOWN_SHAPES:
        if shape <= fields.keys():
            refuse(reason, row.origin, problem, mend)
    needs = "messages; or conversations; or prompt and completion; or instruction and output; or text"
    problem = f"has the fields {list_names(fields)}; expected {needs}"
    mend = "Name them in the source's fields, as in dict(prompt='question', completion='answer')"
    refuse("wrong_format", row.origin, problem, mend)


def check_detected(row: RawRow, format: str, field_map: Mapping[str, str] = _NO_FIELDS) -> None:
    """Hold a row to the format that another row of its file has shown: `wrong_format` where it may be read as another
    too, as if it had been the first."""
    if field_map or not _OF_OTHERS[format].isdisjoint(row.fields):
        detect_format(row, field_map)


def read_fields(row: RawRow, format: str, field_map: Mapping[str, str] = _NO_FIELDS) -> Mapping[str, Any]:
    """The fields of a row by our names, those that its format needs being there.

    Raises:
      RowError: `wrong_format`, `preference_pair`, `unsupported_field`, `needs_media`.
    """
    fields = map_fields(row, field_map)
    for needs in FORMATS[format].needs:
        if needs <= fields.keys():
            break
    else:
        missing = FORMATS[format].needs[0] - fields.keys()
        mapped = [f"{name} (the row's {field_map[name]})" for name in missing if name in field_map]
        lacks = ", ".join(mapped) or list_names(missing)
        has = f"has the fields {list_names(row.fields)} and" if row.fields else "has"
        problem = f"{has} no {lacks}, which the format {format} needs"
        refuse("wrong_format", row.origin, problem)
    if len(fields) > 1:
        _refuse_pairs(fields, row.origin)
        unread = [name for name in _UNREAD[format] & fields.keys() if not is_absent(fields[name])]
        if unread:
            media = _MEDIA.issuperset(unread)
            reason, why = ("needs_media", "text alone is read") if media else ("unsupported_field", "not supported")
            refuse(reason, row.origin, f"sets {list_names(unread)}: {why} in the format {format}")
    return fields


def read_turns(fields: Mapping[str, Any], format: str, origin: Origin) -> RawTurns:
    """The turns of a row of any format but text.

    Raises:
      RowError: the field that holds them is not of the right kind, or empty.
    """
    if format == "messages":
        turns = _check_turns(fields["messages"], "messages", origin)
        raw = RawTurns(turns, _number(len(turns)), 0, OPENAI_ROLES)
    elif format == "sharegpt":
        name = "conversations" if "conversations" in fields else "conversation"
        turns = _check_turns(fields[name], name, origin)
        raw = RawTurns(turns, _number(len(turns)), 0, SHAREGPT_ROLES)
    elif format == "alpaca":
        raw = _alpaca_turns(fields, origin)
    else:
        raw = _prompt_completion_turns(fields, origin)
    if len(fields) == 1 or is_absent(fields.get("system")):
        return raw
    system = {"role": "system", "content": check_text(fields["system"], "system", origin)}
    num_context = raw.num_context and raw.num_context + 1
    return RawTurns([system, *raw.turns], ("system", *raw.labels), num_context, raw.roles)


def ignored_fields(row: RawRow, format: str, field_map: Mapping[str, str] = _NO_FIELDS) -> Set[str]:
    """The fields that `parse_row` does not read; they are counted in the data report."""
    unread = row.fields.keys() - FORMATS[format].reads
    if field_map:
        unread |= row.fields.keys() & field_map.keys()
        unread -= _mapped_fields(row, field_map)
    return unread


def map_fields(row: RawRow, field_map: Mapping[str, str]) -> Mapping[str, Any]:
    """The fields of a row by our names."""
    if not field_map:
        return row.fields
    hidden = _mapped_fields(row, field_map) | field_map.keys()
    fields = {name: value for name, value in row.fields.items() if name not in hidden}
    for name, path in field_map.items():
        found, value = _look_up(row.fields, path)
        if found:
            fields[name] = value
    return fields


def _mapped_fields(row: RawRow, field_map: Mapping[str, str]) -> Set[str]:
    """The row's own names of the fields that are mapped."""
    return {path if path in row.fields else path.split(".")[0] for path in field_map.values()}


def _look_up(fields: Mapping[str, Any], path: str) -> tuple[bool, Any]:
    """Whether a field is there, and its value."""
    if path in fields:
        return True, fields[path]
    value: Any = fields
    for step in path.split("."):
        if isinstance(value, Mapping) and step in value:
            value = value[step]
        elif isinstance(value, list) and step.isdecimal() and len(step) < 10 and int(step) < len(value):
            value = value[int(step)]
        else:
            return False, None
    return True, value


def _formats_of(names: Set[str]) -> list[str]:
    """The formats that fields of these names may be, text last."""
    found = [name for name, format in FORMATS.items() if any(needs <= names for needs in format.needs)]
    half = {"prompt", "completion"} & names
    if half and found and found[0] in ("messages", "sharegpt") and "prompt_completion" not in found:
        found.append("prompt_completion")
    return found


def _is_rendering(fields: Mapping[str, Any], format: str) -> bool:
    """Whether the row's text contains all that its other format needs."""
    text, parts = fields["text"], [fields.get(name) for name in FORMATS[format].needs[0]]
    return isinstance(text, str) and all(isinstance(part, str) and part.strip() in text for part in parts)


def _refuse_pairs(fields: Mapping[str, Any], origin: Origin) -> None:
    if fields.get("label") is False:
        refuse("preference_pair", origin, "has the label false: it shows how not to answer", "Remove the row")
    if _WORSE_ANSWERS.isdisjoint(fields):  # of most rows, and quick
        return
    for shape, reason, problem, mend in _KNOWN_SHAPES:
        if reason == "preference_pair" and shape <= fields.keys():
            refuse(reason, origin, problem, mend)


_LABELS = tuple(f"message {i + 1}" for i in range(64))  # of most rows: made once


def _number(num_messages: int) -> tuple[str, ...]:
    """Labels of messages, counted from 1, as people do."""
    if num_messages <= len(_LABELS):
        return _LABELS[:num_messages]
    return tuple(f"message {i + 1}" for i in range(num_messages))


def _check_turns(value: Any, where: str, origin: Origin) -> list[Any]:
    if not isinstance(value, list):
        refuse("messages_not_a_list", origin, f"{where} is {kind(value)}; expected a list")
    if not value:
        refuse("empty_conversation", origin, f"{where} is an empty list")
    return value


def _alpaca_turns(fields: Mapping[str, Any], origin: Origin) -> RawTurns:
    turns: list[Any] = []
    labels: list[str] = []
    history = fields.get("history")
    if not is_absent(history) and not isinstance(history, list):
        refuse("messages_not_a_list", origin, f"history is {kind(history)}; expected a list of pairs")
    for i, pair in enumerate(history or ()):
        if not isinstance(pair, list) or len(pair) != 2:
            found = f"a list of {len(pair)}" if isinstance(pair, list) else kind(pair)
            refuse("messages_not_a_list", origin, f"history[{i}] is {found}; expected a question and its answer")
        labels += [f"history[{i}][0]", f"history[{i}][1]"]
        turns += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    instruction = check_text(fields["instruction"], "instruction", origin)
    given = fields.get("input")
    extra = "" if is_absent(given) else check_text(given, "input", origin)
    question = "\n".join(text for text in (instruction, extra) if text)
    turns += [{"role": "user", "content": question}, {"role": "assistant", "content": fields["output"]}]
    return RawTurns(turns, (*labels, "instruction", "output"), 0, OPENAI_ROLES)


def _prompt_completion_turns(fields: Mapping[str, Any], origin: Origin) -> RawTurns:
    turns: list[Any] = []
    labels: list[str] = []
    num_context = 0
    for name, role in (("prompt", "user"), ("completion", "assistant")):
        value = fields[name]
        if isinstance(value, list):
            turns += _check_turns(value, name, origin)
            labels += [f"{name} message {i + 1}" for i in range(len(value))]
        elif isinstance(value, dict):
            turns.append(value)
            labels.append(name)
        else:
            turns.append({"role": role, "content": check_text(value, name, origin)})
            labels.append(name)
        num_context = num_context or len(turns)
    return RawTurns(turns, tuple(labels), num_context, SHAREGPT_ROLES)
