"""The grammar of conversations: what a message may say, what may follow what, and each fault under its own reason."""

import json
from collections import Counter

import pytest
from malformed_rows import (
    ASK,
    ASK_BOTH,
    ASK_UNNAMED,
    CALL,
    MALFORMED,
    OF_OTHER_ROOMS,
    ORIGIN,
    OTHER_CALL,
    SECRET,
    A,
    S,
    T,
    U,
    chat,
    result,
    row,
    turn,
)

from sft_jax.data.conversations import parse_prompt, parse_row
from sft_jax.data.errors import RowError
from sft_jax.datatypes import Conversation, Message, ToolCall
from sft_jax.row_reasons import REASONS

PARSED_CALL = ToolCall("f", {"x": 1}, '{"x": 1}', "c1")
KEEPABLE = frozenset(reason for reason, entry in REASONS.items() if entry.keep)


@pytest.mark.parametrize(
    "turns",
    [
        [U, A],
        [S, U, A],
        [turn("system", ""), U, A],  # exporters write an empty system prompt for none
        [U, A, U, A],
        [U, ASK],  # a demonstration of the call itself
        [U, ASK, result("c1"), A],
        [U, ASK_BOTH, result("c2"), result("c1"), A, U, A],
        [U, ASK_BOTH, result(), result(), A],
        [U, ASK_UNNAMED, result(), result(), A],
        [U, ASK_UNNAMED, result(), A],  # one result for all calls
        [U, ASK, result("c1"), ASK, result("c1"), A],  # ids are of a turn
        [U, ASK, turn("tool", "", tool_call_id="c1"), A],  # a tool may have nothing to say
    ],
)
def test_lawful_orders(turns):
    parsed = parse_row(chat(*turns), "messages")
    assert [message.role for message in parsed.messages] == [value["role"] for value in turns]
    assert [message.content for message in parsed.messages] == [value["content"] or "" for value in turns]


TEXT = {"type": "text", "text": "Hello"}
REASONED = Message("assistant", "Hello", reasoning="Hm")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (turn("assistant", "Hello"), Message("assistant", "Hello")),
        (turn("assistant", " 6\n"), Message("assistant", " 6\n")),  # content is kept to the byte
        (turn("assistant", [TEXT, {"type": "text", "value": " you"}]), Message("assistant", "Hello you")),
        (turn("assistant", [TEXT | {"image_url": None}]), Message("assistant", "Hello")),
        (turn("assistant", [{"type": "reasoning", "value": "Hm"}, TEXT]), REASONED),
        (turn("assistant", [{"type": "thinking", "thinking": "Hm"}, TEXT]), REASONED),
        (turn("assistant", "Hello", reasoning_content="Hm"), REASONED),
        (turn("assistant", "Hello", thinking="Hm"), REASONED),
        (turn("assistant", "Hello", reasoning="Hm", reasoning_content="Hm"), REASONED),
        (turn("assistant", None, tool_calls=[CALL]), Message("assistant", "", tool_calls=(PARSED_CALL,))),
        ({"role": "assistant", "tool_calls": [CALL]}, Message("assistant", "", tool_calls=(PARSED_CALL,))),
        (turn("assistant", "Look", tool_calls=[CALL]), Message("assistant", "Look", tool_calls=(PARSED_CALL,))),
        (
            turn("assistant", None, tool_calls=[{"name": "f", "arguments": {"é": [1, None]}, "id": None}]),
            Message("assistant", "", tool_calls=(ToolCall("f", {"é": [1, None]}, '{"é": [1, null]}'),)),
        ),
        (
            turn("assistant", None, function_call={"name": "f", "arguments": '{"x":  1}'}),
            Message("assistant", "", tool_calls=(ToolCall("f", {"x": 1}, '{"x":  1}'),)),
        ),
        (
            turn("assistant", [{"type": "tool_call", "value": '{"name": "f", "arguments": {"x": 1}}'}]),
            Message("assistant", "", tool_calls=(ToolCall("f", {"x": 1}, '{"x": 1}'),)),
        ),
        (
            turn("assistant", [{"type": "tool_calls", "tool_calls": [CALL, OTHER_CALL]}]),
            Message("assistant", "", tool_calls=(PARSED_CALL, ToolCall("f", {"x": 2}, '{"x": 2}', "c2"))),
        ),
        (turn("assistant", "Hello", weight=0), Message("assistant", "Hello", loss_weight=0.0)),
        (turn("assistant", "Hello", train=True), Message("assistant", "Hello", loss_weight=1.0)),
        (turn("assistant", "Hello", loss_weight=0.25), Message("assistant", "Hello", loss_weight=0.25)),
        (turn("assistant", "Hello", train=False, weight=0), Message("assistant", "Hello", loss_weight=0.0)),
        (turn("assistant", "Hello", weight=None, refusal=None, tool_calls=[], audio={}), Message("assistant", "Hello")),
        (turn("user", "Hi", weight=0, train=False, loss_weight=0.0), Message("user", "Hi")),
        (turn("developer", "Be brief."), Message("system", "Be brief.")),
    ],
)
def test_messages(value, expected):
    if expected.role == "assistant":
        assert parse_row(chat(U, value), "messages").messages[1] == expected
    else:
        assert (
            parse_row(chat(value, *([U] if expected.role == "system" else []), A), "messages").messages[0] == expected
        )


def test_results_of_tools():
    named = turn("tool", "7", tool_call_id="c1", name="f")
    old = turn("function", "7", name="f")
    for value, expected in (
        (named, Message("tool", "7", tool_call_id="c1", name="f")),
        (old, Message("tool", "7", name="f")),
    ):
        assert parse_row(chat(U, ASK, value, A), "messages").messages[2] == expected


SCHEMA = {"type": "function", "function": {"name": "f", "parameters": {"z": None, "a": {}}}}


@pytest.mark.parametrize("tools", [[SCHEMA], json.dumps([SCHEMA])])
@pytest.mark.parametrize("field", ["tools", "functions"])
def test_tools_are_kept_as_they_are(field, tools):
    parsed = parse_row(chat(U, A, **{field: tools}), "messages")
    assert parsed.tools == (SCHEMA,)
    assert json.dumps(parsed.tools[0]) == json.dumps(SCHEMA)  # the order of keys too
    offered = turn("system", [{"type": "text", "text": "Be brief."}])
    offered["content"].insert(0, {"type": "tools", "value": tools})
    assert parse_row(chat(offered, U, A), "messages").tools == (SCHEMA,)


@pytest.mark.parametrize("tools", [None, "", " \n", [], {}, "[]", "null"])
def test_no_tools(tools):
    assert parse_row(chat(U, A, tools=tools), "messages").tools == ()


def test_every_reason_of_this_room_is_tried():
    assert MALFORMED.keys() >= REASONS.keys() - OF_OTHER_ROOMS
    assert MALFORMED.keys() <= REASONS.keys()


@pytest.mark.parametrize(
    ("reason", "bad"),
    [pytest.param(reason, bad, id=f"{reason}-{i}") for reason, rows in MALFORMED.items() for i, bad in enumerate(rows)],
)
def test_each_fault_has_its_reason(reason, bad):
    with pytest.raises(RowError) as raised:
        parse_row(bad, "auto")
    assert raised.value.reason == reason
    assert raised.value.origin == ORIGIN
    message = str(raised.value)
    assert message.startswith("train.jsonl:1841: ")
    assert message.endswith(".")
    assert ". " in message, "says how to mend it"
    assert SECRET not in message, "never shows content"
    assert len(message) < 500


@pytest.mark.parametrize(
    ("reason", "bad"),
    [
        pytest.param(reason, bad, id=f"{reason}-{i}")
        for reason in sorted(KEEPABLE)
        for i, bad in enumerate(MALFORMED[reason])
    ],
)
def test_keep_lets_a_row_pass_and_counts_it(reason, bad):
    kept = Counter()
    parsed = parse_row(bad, "auto", keep=KEEPABLE, kept=kept)
    assert kept[reason] >= 1
    assert parsed.messages[-1].role == "assistant"
    with pytest.raises(RowError):
        parse_row(bad, "auto", keep=KEEPABLE - {reason})


@pytest.mark.parametrize(
    ("bad", "expected", "counts"),
    [
        (chat(U, A, U, U), "ua", {"two_users": 1, "ends_without_assistant": 2}),
        (chat(U, ASK, result("c1")), "ua", {"ends_without_assistant": 1}),
        (chat(U, U, A, A), "uuaa", {"two_users": 1, "two_assistants": 1}),
        (chat(U, S, A), "usa", {"system_not_first": 1}),
        (chat(A, U, A), "aua", {"assistant_first": 1}),
        (chat(U, ASK, result("x"), A), "uata", {"wrong_call_id": 1}),
        (chat(U, ASK, U, A), "uaua", {"unanswered_call": 1}),
        (chat(U, A, T, A), "uata", {"tool_without_call": 1}),
        (chat(U | {"weight": 1}, turn("assistant", "")), "ua", {"weight_on_context": 1, "empty_assistant": 1}),
    ],
)
def test_what_keep_does(bad, expected, counts):
    kept = Counter()
    parsed = parse_row(bad, "messages", keep=KEEPABLE, kept=kept)
    assert "".join(message.role[0] for message in parsed.messages) == expected
    assert kept == counts


def test_the_answers_of_a_prompt_are_context_to_the_last():
    sample = row(prompt=[U, A], completion=SECRET, system=SECRET)
    parsed = parse_row(sample, "prompt_completion", keep=KEEPABLE)
    assert [message.loss_weight for message in parsed.messages] == [None, None, 0.0, None]


def test_a_refused_row_counts_nothing_as_kept():
    kept = Counter()
    with pytest.raises(RowError, match="no assistant turn"):
        parse_row(chat(U, U), "messages", keep=KEEPABLE, kept=kept)
    assert not kept


def test_the_message_of_an_unknown_role():
    with pytest.raises(RowError) as raised:
        parse_row(chat(U, A, turn("bot")), "messages")
    assert str(raised.value) == (
        "train.jsonl:1841: message 3 has role 'bot'; expected system, user, assistant or tool. "
        "Fix the row, or map it with config.data.role_map."
    )


def test_the_message_of_a_reason_that_can_be_kept():
    with pytest.raises(RowError) as raised:
        parse_row(chat(U, U, A), "messages")
    assert str(raised.value) == (
        "train.jsonl:1841: message 2 is a user turn after a user turn. Join them, or add the answer; or set "
        "config.data.policies.two_users to drop or keep."
    )


def test_role_map():
    human, gpt = turn("human"), turn("gpt")
    mapped = parse_row(chat(human, gpt, U, gpt), "messages", {"human": "user", "gpt": "assistant"})
    assert [message.role for message in mapped.messages] == ["user", "assistant", "user", "assistant"]
    with pytest.raises(RowError, match="role 'gpt', mapped to 'model'; expected"):
        parse_row(chat(U, gpt), "messages", {"gpt": "model"})


def test_names_in_messages_are_short():
    bad = chat(U | {f"field {i:03}" * 20: 1 for i in range(100)}, A)
    with pytest.raises(RowError, match="and 88 more") as raised:
        parse_row(bad, "messages")
    assert len(str(raised.value)) < 1000


def test_prompts_may_end_with_a_question():
    assert parse_prompt(chat(S, U)).messages == (Message("system", SECRET), Message("user", SECRET))
    shared = row(conversations=[{"from": "human", "value": "Hi"}], tools=[SCHEMA])
    assert parse_prompt(shared) == Conversation((Message("user", "Hi"),), ORIGIN, (SCHEMA,))
    with pytest.raises(RowError, match="no messages"):
        parse_prompt(row(text="a"))
