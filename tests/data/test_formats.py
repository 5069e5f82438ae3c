"""The formats of rows, which of them `auto` takes, and what becomes of every real set."""

import json

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings
from malformed_rows import ORIGIN, A, U, chat, row, turn

from sft_jax.data.conversations import parse_row
from sft_jax.data.errors import RowError
from sft_jax.data.formats import UNSUPPORTED_FIELDS, detect_format, ignored_fields
from sft_jax.datatypes import Conversation, Document, Message, RawRow, ToolCall
from sft_jax.row_formats import FIELD_NAMES, FORMATS
from sft_jax.row_reasons import REASONS

HI = (Message("user", "Hi"), Message("assistant", "Hello."))
BRIEF = Message("system", "Be brief.")
SCHEMA = {"name": "f", "parameters": {}}
CALL_JSON = '{"name": "f", "arguments": {"x": 1.5}}'
CALLS = Message("assistant", "", tool_calls=(ToolCall("f", {"x": 1.5}, '{"x": 1.5}'),))


def said(*turns):
    """said("human Hi", "gpt Hello.") -> turns in ShareGPT's names."""
    return [dict(zip(("from", "value"), turn.split(" ", 1), strict=True)) for turn in turns]


@pytest.mark.parametrize(
    ("format", "fields", "expected"),
    [
        ("messages", dict(messages=[turn("user", "Hi"), turn("assistant", "Hello.")]), HI),
        (
            "messages",
            dict(messages=[turn("user", "Hi"), turn("assistant", "Hello.")], system="Be brief."),
            (BRIEF, *HI),
        ),
        ("sharegpt", dict(conversations=said("human Hi", "gpt Hello.")), HI),
        ("sharegpt", dict(conversation=said("user Hi", "assistant Hello.")), HI),
        ("sharegpt", dict(conversations=[turn("user", "Hi"), turn("model", "Hello.")]), HI),
        ("sharegpt", dict(conversations=said("human Hi", "gpt Hello."), system="Be brief."), (BRIEF, *HI)),
        ("sharegpt", dict(conversations=said("system Be brief.", "human Hi", "bot Hello."), system=""), (BRIEF, *HI)),
        (
            "sharegpt",
            dict(conversations=said("human Hi", f"function_call {CALL_JSON}", "observation 7", "gpt Hello.")),
            (HI[0], CALLS, Message("tool", "7"), HI[1]),
        ),
        (
            "sharegpt",
            dict(conversations=[*said("human Hi"), {"from": "function_call", "value": [json.loads(CALL_JSON)]}]),
            (HI[0], CALLS),
        ),
        (
            "sharegpt",
            dict(conversations=said("human Hi", f"function_call [{CALL_JSON}, {CALL_JSON}]")),
            (HI[0], Message("assistant", "", tool_calls=CALLS.tool_calls * 2)),
        ),
        (
            "sharegpt",
            dict(conversations=[*said("human Hi"), {"from": "gpt", "value": "Hello.", "loss_weight": 0.5}]),
            (HI[0], Message("assistant", "Hello.", loss_weight=0.5)),
        ),
        ("alpaca", dict(instruction="Hi", output="Hello."), HI),
        ("alpaca", dict(instruction="Hi", input="", output="Hello.", history=[], system=None), HI),
        ("alpaca", dict(instruction="", input="Hi", output="Hello."), HI),
        (
            "alpaca",
            dict(instruction="Add.", input="1 and 2", output="3", history=[["Hi", "Hello."]], system="Be brief."),
            (BRIEF, *HI, Message("user", "Add.\n1 and 2"), Message("assistant", "3")),
        ),
        ("prompt_completion", dict(prompt="Hi", completion="Hello."), HI),
        ("prompt_completion", dict(prompt="Hi", completion="Hello.", system="Be brief."), (BRIEF, *HI)),
        ("prompt_completion", dict(prompt=[turn("user", "Hi")], completion=[turn("assistant", "Hello.")]), HI),
        ("prompt_completion", dict(prompt=said("human Hi"), completion=said("gpt Hello.")[0]), HI),
        (
            "prompt_completion",  # the answers of a prompt are context
            dict(prompt=said("human a", "gpt b", "human Hi"), completion="Hello.", system="Be brief."),
            (BRIEF, Message("user", "a"), Message("assistant", "b", loss_weight=0.0), *HI),
        ),
    ],
)
def test_formats(format, fields, expected):
    sample = RawRow(fields, ORIGIN)
    assert detect_format(sample) == format
    assert parse_row(sample, "auto") == parse_row(sample, format) == Conversation(expected, ORIGIN)
    with_tools = RawRow(fields | {"tools": json.dumps([SCHEMA]), "id": 7}, ORIGIN)
    assert parse_row(with_tools, format) == Conversation(expected, ORIGIN, (SCHEMA,))
    assert ignored_fields(with_tools, format) == {"id"}


def test_text():
    sample = row(text=" Once\n", id=7)
    assert detect_format(sample) == "text"
    assert parse_row(sample, "auto") == Document(" Once\n", ORIGIN)
    assert ignored_fields(sample, "text") == {"id"}


@pytest.mark.parametrize(
    ("fields", "field_map", "format"),
    [
        (dict(question="Hi", answer="Hello."), dict(prompt="question", completion="answer"), "prompt_completion"),
        (dict(instruction="Hi", response="Hello."), dict(output="response"), "alpaca"),
        (
            dict(instruction="Hi", instances=[{"input": "", "output": "Hello."}]),
            dict(input="instances.0.input", output="instances.0.output"),
            "alpaca",
        ),
        (dict(prompt="Hi", chosen="Hello.", rejected="No."), dict(completion="chosen"), "prompt_completion"),
        (
            dict(conversations=said("human Hi"), chosen=said("gpt Hello.")[0], rejected=said("gpt No.")[0]),
            dict(prompt="conversations", completion="chosen"),
            "prompt_completion",
        ),
        (
            dict(chosen=[turn("user", "Hi"), turn("assistant", "Hello.")], rejected=[]),
            dict(messages="chosen"),
            "messages",
        ),
        (dict(messages=said("human Hi", "gpt Hello.")), dict(conversations="messages"), "sharegpt"),
        ({"a.b": "Hi", "a": {"b": "no"}, "c": "Hello."}, dict(prompt="a.b", completion="c"), "prompt_completion"),
        (dict(prompt="no", question="Hi", completion="Hello."), dict(prompt="question"), "prompt_completion"),
    ],
)
def test_a_field_map_reads_other_names(fields, field_map, format):
    sample = RawRow(fields, ORIGIN)
    assert detect_format(sample, field_map) == format
    assert (
        parse_row(sample, "auto", {}, field_map) == parse_row(sample, format, {}, field_map) == Conversation(HI, ORIGIN)
    )


@pytest.mark.parametrize(
    ("fields", "field_map", "lacks"),
    [
        (dict(question="Hi", answer="Yes."), dict(prompt="query", completion="answer"), "no query, .* as prompt"),
        (dict(question="Hi"), dict(prompt="query", completion="reply"), "no query, reply, .* as prompt, completion"),
        (dict(text="Hi", chat=[]), dict(messages="chats"), "no chats, .* as messages"),  # and no document
        (dict(prompt="Hi", completion="Yes."), dict(completion="answers.0"), r"no answers\.0, .* as completion"),
    ],
)
def test_a_map_to_a_field_that_the_row_has_not_is_named(fields, field_map, lacks):
    names = ", ".join(sorted(fields))
    with pytest.raises(RowError, match=rf"has the fields {names} and {lacks}\. Fix the row, or name the right field"):
        detect_format(RawRow(fields, ORIGIN), field_map)


def test_fields_that_a_map_does_not_read_are_ignored_by_name():
    pair = row(prompt="Hi", chosen="Hello.", rejected="No.", completion="unread", extra=1)
    assert ignored_fields(pair, "prompt_completion", dict(completion="chosen")) == {"rejected", "completion", "extra"}
    nested = row(instruction="a", instances=[{"input": "", "output": "b"}], id=1)
    field_map = dict(input="instances.0.input", output="instances.0.output")
    assert ignored_fields(nested, "alpaca", field_map) == {"id"}


@pytest.mark.parametrize(
    "path", ["answers", "answer.text", "list.1", "list.x", "list.9999999999999", "list.-1", ".", "list."]
)
def test_a_mapped_field_that_is_not_there(path):
    with pytest.raises(
        RowError, match=r"and no completion \(the row's .*, which the format prompt_completion needs"
    ) as raised:
        parse_row(
            row(question="a", answer="b", list=["c"]), "prompt_completion", {}, dict(prompt="question", completion=path)
        )
    assert raised.value.reason == "wrong_format"


@pytest.mark.parametrize(
    ("fields", "format"),
    [
        (dict(messages=[U, A], prompt=None, text=None), "messages"),  # columns of another row's format
        (dict(instruction="Add.", input="1", output="2", text="### Add.\n1\n### 2"), "alpaca"),  # its own rendering
    ],
)
def test_fields_that_do_not_make_a_row_ambiguous(fields, format):
    assert detect_format(RawRow(fields, ORIGIN)) == format


def test_a_named_format_decides_where_a_row_has_the_fields_of_two():
    both = row(text="a", prompt="b", completion="c")
    assert parse_row(both, "text") == Document("a", ORIGIN)
    assert ignored_fields(both, "text") == {"prompt", "completion"}
    with pytest.raises(RowError, match=r"may be read as prompt_completion or text\. Choose with the source's format"):
        parse_row(both, "auto")
    with pytest.raises(RowError, match="may be read as messages or prompt_completion"):
        parse_row(chat(U, A, prompt="a"), "auto")


def test_a_row_of_another_format_is_wrong():
    for format in FORMATS.keys() - {"text"}:
        with pytest.raises(RowError, match=f"which the format {format} needs") as raised:
            parse_row(row(text="a"), format)
        assert raised.value.reason == "wrong_format"


@pytest.mark.parametrize("empty", [None, "", [], {}])
def test_empty_fields_are_absent(empty):
    turns = [U | {"name": empty}, A | {"tool_calls": empty, "anything": empty}]
    fields = dict.fromkeys(UNSUPPORTED_FIELDS | {"system", "history", "functions"}, empty)
    assert parse_row(chat(*turns, **fields), "messages") == parse_row(chat(U, A), "messages")


KEEPABLE = frozenset(reason for reason, entry in REASONS.items() if entry.keep)
MESSAGE_FIELDS = (
    "role", "content", "from", "value", "type", "tool_calls", "function_call", "function", "name", "arguments", "id",
    "tool_call_id", "weight", "train", "loss_weight", "reasoning", "thinking", "chosen", "rejected", "images", "x",
)  # fmt: skip
WORDS = (
    "user", "assistant", "system", "tool", "human", "gpt", "function_call", "observation", "text", "function", "tools",
    "reasoning", "tool_call", "image", '{"name": "f", "arguments": {}}', "[]", "{", "NaN", "\ud800", "", " ", "\u2028",
)  # fmt: skip
names, words = st.sampled_from([*sorted(FIELD_NAMES), *MESSAGE_FIELDS]), st.sampled_from(WORDS)
leaves = st.none() | st.booleans() | st.integers() | st.floats() | words | st.text(max_size=5)
values = st.recursive(
    leaves, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(names, inner, max_size=4), max_leaves=12
)
roles = st.sampled_from(["user", "assistant", "system", "tool", "developer", "human", "gpt", "function_call"])
plain_messages = st.fixed_dictionaries({"role": roles, "content": words})
messages = (
    st.fixed_dictionaries({}, optional={"role": roles, "content": words, "from": roles, "value": words})
    | st.builds(lambda plain, extra: extra | plain, plain_messages, st.dictionaries(names, values, max_size=2))
    | plain_messages
)
turns = st.lists(messages | values, max_size=5)
rows = st.dictionaries(names, values | turns, max_size=4) | st.fixed_dictionaries(
    {"messages": turns | st.lists(messages)}
)


def find_reason(*args, **options):
    """The parsed row, and an empty string; or None and why it is refused."""
    try:
        return parse_row(*args, **options), ""
    except RowError as error:
        str(error).encode()  # can be printed
        return None, error.reason


@settings(max_examples=1_000, deadline=None)
@given(rows, st.sampled_from(["auto", *FORMATS]), st.booleans())
def test_any_json_gives_a_conversation_a_document_or_a_row_error(fields, format, keep):
    sample = RawRow(fields, ORIGIN)
    parsed, reason = find_reason(sample, format, keep=KEEPABLE if keep else frozenset())
    if reason:
        assert reason in REASONS
        return
    ignored_fields(sample, detect_format(sample) if format == "auto" else format)
    if isinstance(parsed, Document):
        assert parsed.text.strip()
        return
    assert parsed.messages[-1].role == "assistant"
    assert all(isinstance(tool, dict) for tool in parsed.tools)
    for message in parsed.messages:
        assert message.role in ("system", "user", "assistant", "tool")
        assert message.loss_weight is None or (message.role == "assistant" and message.loss_weight >= 0)
        assert all(json.loads(call.arguments_json) == call.arguments for call in message.tool_calls)


@settings(max_examples=300, deadline=None)
@given(rows, st.dictionaries(st.sampled_from(sorted(FIELD_NAMES)), names | st.text(max_size=9), max_size=3))
def test_any_field_map_gives_a_row_or_a_row_error(fields, field_map):
    parsed, reason = find_reason(RawRow(fields, ORIGIN), "auto", {"x": "user"}, field_map)
    assert parsed if not reason else reason in REASONS
