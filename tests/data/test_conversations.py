"""Rows of three formats, and each way in which a row can be wrong under its own reason."""

import pytest

from sft_jax.data.conversations import (
    FORMAT_FIELDS,
    UNSUPPORTED_FIELDS,
    detect_format,
    ignored_fields,
    parse_messages,
    parse_row,
)
from sft_jax.data.errors import RowError
from sft_jax.datatypes import Conversation, Document, Message, Origin, RawRow

ORIGIN = Origin("train.jsonl", 1841)


def chat(*turns, **fields):
    """chat("user Hi", "assistant Hello.") -> a row of messages."""
    messages = [dict(zip(("role", "content"), turn.split(" ", 1), strict=True)) for turn in turns]
    return RawRow({"messages": messages, **fields}, ORIGIN)


def row(**fields):
    return RawRow(fields, ORIGIN)


def test_the_three_formats():
    turns = (Message("user", "Hi"), Message("assistant", "Hello."))
    assert parse_row(chat("user Hi", "assistant Hello."), "messages", {}) == Conversation(turns, ORIGIN)
    assert parse_row(row(prompt="Hi", completion="Hello."), "prompt_completion", {}) == Conversation(turns, ORIGIN)
    assert parse_row(row(text=" Once\n"), "text", {}) == Document(" Once\n", ORIGIN)  # content is kept to the byte


@pytest.mark.parametrize("format", FORMAT_FIELDS)
def test_auto_is_the_format_whose_fields_the_row_has(format):
    fields = {"messages": chat("user a", "assistant b").fields, "text": {"text": "a"}}
    fields["prompt_completion"] = {"prompt": "a", "completion": "b"}
    sample = RawRow(fields[format] | {"id": 7}, ORIGIN)
    assert detect_format(sample) == format
    assert parse_row(sample, "auto", {}) == parse_row(sample, format, {})
    assert ignored_fields(sample, format) == {"id"}


@pytest.mark.parametrize(
    "turns",
    [
        ("system s", "user a", "assistant b"),
        ("system ", "user a", "assistant b"),  # exporters write an empty system prompt for none
        ("user a", "assistant b", "user c", "assistant d"),
        ("user a", "assistant call", "tool 1", "tool 2", "assistant b", "user c", "assistant d"),
    ],
)
def test_lawful_orders(turns):
    parsed = parse_row(chat(*turns), "messages", {})
    assert [f"{message.role} {message.content}" for message in parsed.messages] == list(turns)


MALFORMED = {
    "messages_not_a_list": [row(messages="user: hi"), row(messages=None), row(messages={"role": "user"})],
    "empty_conversation": [row(messages=[])],
    "message_not_an_object": [row(messages=["hi"]), row(messages=[None])],
    "missing_role": [row(messages=[{"content": "hi"}])],
    "missing_content": [row(messages=[{"role": "user"}])],
    "unknown_role": [chat("human hi", "assistant b"), row(messages=[{"role": ["user"], "content": "hi"}])],
    "content_not_text": [
        row(messages=[{"role": "user", "content": [{"type": "text", "text": "hi"}]}]),
        row(messages=[{"role": "user", "content": None}]),
        row(messages=[{"role": "user", "content": 7}]),
        row(prompt="hi", completion=7),
        row(prompt=None, completion="hi"),
        row(text=["hi"]),
    ],
    "empty_assistant": [
        chat("user a", "assistant "),
        chat("user a", "assistant  \n"),
        chat("user a", "assistant ", "user c", "assistant d"),
        row(prompt="a", completion=""),
    ],
    "empty_text": [row(text=""), row(text=" \n")],
    "no_assistant_turn": [chat("user a"), chat("system a"), chat("system a", "user b")],
    "ends_without_assistant": [
        chat("user a", "assistant b", "user c"),
        chat("user a", "assistant b", "tool c"),
    ],
    "system_not_first": [
        chat("user a", "system b", "assistant c"),
        chat("system a", "system b", "user c", "assistant d"),
        chat("user a", "assistant b", "system c"),
    ],
    "role_order": [
        chat("user a", "user b", "assistant c"),
        chat("user a", "assistant b", "assistant c"),
        chat("assistant a", "user b", "assistant c"),
        chat("system a", "assistant b"),
        chat("tool a", "user b", "assistant c"),
        chat("user a", "tool b", "assistant c"),
        chat("user a", "assistant b", "tool c", "user d", "assistant e"),
    ],
    "unsupported_field": [
        chat("user a", "assistant b", tools=[{"name": "f"}]),
        chat("user a", "assistant b", weight=0),
        row(prompt="a", completion="b", history=[["c", "d"]]),
        row(messages=[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "tool_calls": [{}]}]),
        row(messages=[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0}]),
        row(messages=[{"role": "user", "content": "a", "anything": "a template could show this"}]),
    ],
    "wrong_format": [row(), row(question="a", answer="b"), row(prompt="a"), row(text="a", prompt="b", completion="c")],
}  # fmt: skip


@pytest.mark.parametrize(("reason", "bad"), [(reason, bad) for reason, rows in MALFORMED.items() for bad in rows])
def test_each_malformation_has_its_reason(reason, bad):
    with pytest.raises(RowError) as raised:
        parse_row(bad, "auto", {})
    assert raised.value.reason == reason
    assert raised.value.origin == ORIGIN
    message = str(raised.value)
    assert message.startswith("train.jsonl:1841: ")
    assert message.endswith(".")


def test_the_message_of_an_unknown_role():
    bad = chat("user a", "assistant b", "bot c")
    with pytest.raises(RowError) as raised:
        parse_row(bad, "messages", {})
    assert str(raised.value) == (
        "train.jsonl:1841: message 3 has role 'bot'; expected system, user, assistant or tool. "
        "Fix the row, or map it with config.data.role_map."
    )


def test_role_map():
    mapped = parse_row(chat("human a", "gpt b", "user c", "gpt d"), "messages", {"human": "user", "gpt": "assistant"})
    assert [message.role for message in mapped.messages] == ["user", "assistant", "user", "assistant"]
    with pytest.raises(RowError, match="role 'gpt', mapped to 'model'; expected"):
        parse_row(chat("user a", "gpt b"), "messages", {"gpt": "model"})


def test_a_row_of_another_format_is_wrong():
    for format in FORMAT_FIELDS.keys() - {"text"}:
        with pytest.raises(RowError, match=f"which the format {format} needs") as raised:
            parse_row(row(text="a"), format, {})
        assert raised.value.reason == "wrong_format"


def test_a_named_format_decides_where_a_row_has_the_fields_of_two():
    both = row(text="a", prompt="b", completion="c")
    assert parse_row(both, "text", {}) == Document("a", ORIGIN)
    assert ignored_fields(both, "text") == {"prompt", "completion"}


@pytest.mark.parametrize("empty", [None, "", [], {}])
def test_empty_unsupported_fields_are_absent(empty):
    fields = dict.fromkeys(UNSUPPORTED_FIELDS, empty)
    turns = [
        {"role": "user", "content": "a", "name": empty},
        {"role": "assistant", "content": "b", "tool_calls": empty},
    ]
    assert parse_row(row(messages=turns, **fields), "messages", {}) == parse_row(
        chat("user a", "assistant b"), "messages", {}
    )


def test_parse_messages_may_end_with_a_question():
    assert parse_messages(chat("system s", "user a")) == (Message("system", "s"), Message("user", "a"))
    with pytest.raises(RowError, match="expected messages"):
        parse_messages(row(text="a"))
