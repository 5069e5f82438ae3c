"""Malformed rows, each under the reason for which it must be refused; and short ways to write rows."""

from sft_jax.datatypes import Origin, RawRow

ORIGIN = Origin("train.jsonl", 1841)
SECRET = "secret"  # stands for all content; no message of an error may show it
CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
OTHER_CALL = {"id": "c2", "type": "function", "function": {"name": "f", "arguments": {"x": 2}}}


def turn(role, content=SECRET, **fields):
    return {"role": role, "content": content, **fields}


TEXT = {"type": "text", "text": SECRET}
U, A, S, T = turn("user"), turn("assistant"), turn("system"), turn("tool")
ASK = turn("assistant", None, tool_calls=[CALL])
ASK_BOTH = turn("assistant", None, tool_calls=[CALL, OTHER_CALL])
ASK_UNNAMED = turn("assistant", None, tool_calls=[{"name": "f", "arguments": {}}, {"name": "g", "arguments": {}}])


def result(call_id=""):
    return turn("tool", tool_call_id=call_id)


def chat(*turns, **fields):
    return RawRow({"messages": list(turns), **fields}, ORIGIN)


def answer(content=SECRET, **fields):
    """A row whose second message is an assistant turn with these fields."""
    return chat(U, turn("assistant", content, **fields))


def call(value):
    return answer(None, tool_calls=[value])


def parts(*content, role="assistant"):
    return chat(*([U] if role == "assistant" else []), turn(role, list(content)), *([A] if role != "assistant" else []))


def row(**fields):
    return RawRow(fields, ORIGIN)


DEEP = "[" * 100_000 + "]" * 100_000
NESTED = {}
for _ in range(100_000):
    NESTED = {"x": NESTED}

MALFORMED = {
    "messages_not_a_list": [
        row(messages="user: hi"),
        row(messages=None),
        row(messages={"role": "user"}),
        *(row(instruction=SECRET, output=SECRET, history=value) for value in (SECRET, 3, [SECRET], [[SECRET]])),
    ],
    "empty_conversation": [row(messages=[]), row(conversations=[]), row(prompt=[], completion=SECRET)],
    "message_not_an_object": [row(messages=[SECRET]), row(messages=[None]), row(prompt=[[]], completion=SECRET)],
    "missing_role": [chat({"content": SECRET}), chat({"from": "human", "value": SECRET})],
    "missing_content": [chat({"role": "user"}), chat(U, {"role": "assistant", "reasoning": SECRET})],
    "unknown_role": [chat(turn("human"), A), chat(turn(["user"])), chat(turn(None)), chat(turn(""))],
    "content_not_text": [
        *(chat(turn("user", value), A) for value in (None, 7, True, {"text": SECRET})),
        *(chat(U, turn("assistant", value)) for value in (None, 7.5, False)),
        *(row(prompt=SECRET, completion=value) for value in (7, None)),
        row(prompt=None, completion=SECRET),
        row(text=[SECRET]),
        row(instruction=SECRET, input=3, output=SECRET),
        row(conversations=[{"from": "human", "value": 7}]),
        chat(U, A, system=7),
    ],
    "bad_part": [
        *(parts(part) for part in (SECRET, None, {}, {"type": None}, {"type": "text"}, {"type": "text", "text": 3})),
        parts({"type": "unheard"}),
        parts({"type": "text", "text": SECRET, "value": SECRET}),
        parts(TEXT, {"type": "reasoning", "text": SECRET}),
        parts({"type": "tool_call", "value": {"name": "f", "arguments": {}}}, TEXT),
    ],
    "needs_media": [
        parts({"type": "image_url", "image_url": {"url": SECRET}}, TEXT, role="user"),
        parts({"type": "input_audio"}, role="user"),
        chat(U, A, images=[SECRET]),
    ],
    "empty_content": [
        chat(turn("user", ""), A),
        chat(turn("user", " \n"), A),
        row(prompt="", completion=SECRET),
        parts(role="user"),
        row(instruction="", output=SECRET, input=""),
    ],
    "empty_assistant": [
        answer(""),
        answer("  \n"),
        answer([]),
        answer("", reasoning=SECRET),
        chat(U, turn("assistant", ""), U, A),
        row(prompt=SECRET, completion=""),
        row(instruction=SECRET, output=""),
    ],
    "empty_text": [row(text=""), row(text=" \n")],
    "no_assistant_turn": [chat(U), chat(S), chat(S, U)],
    "ends_without_assistant": [chat(U, A, U), chat(U, ASK, result("c1"))],
    "system_not_first": [chat(U, S, A), chat(S, S, U, A), chat(U, A, S), chat(S, U, A, system=SECRET)],
    "assistant_first": [chat(A, U, A), chat(S, A), row(prompt=[S], completion=SECRET)],
    "two_users": [chat(U, U, A), chat(U, A, U, U, A), row(prompt=[U], completion=[U, A])],
    "two_assistants": [chat(U, A, A), row(prompt=[U, A], completion=SECRET), chat(U, A, ASK)],
    "unanswered_result": [chat(U, ASK, result("c1"), U, A)],
    "tool_without_call": [
        chat(T, U, A),
        chat(U, T, A),
        chat(U, A, T, A),
        chat(U, ASK, result("c1"), A, result("c1"), A),
        chat(U, ASK, result(), result(), A),
    ],
    "wrong_call_id": [
        chat(U, ASK, result("c2"), A),
        chat(U, ASK, result("c1"), result("c1"), A),
        chat(U, ASK_UNNAMED, result("c1"), result("c2"), A),
    ],
    "unanswered_call": [
        chat(U, ASK, A),
        chat(U, ASK, U, A),
        chat(U, ASK_BOTH, result("c1"), A),
        chat(U, ASK, ASK),
        chat(U, ASK_BOTH, result(), A),
    ],
    "bad_tool_call": [
        *(call(value) for value in (None, "f", {}, {"name": "f"}, {"arguments": {}}, {"name": 3, "arguments": {}})),
        *(answer(None, tool_calls=value) for value in (SECRET, 3, False, {"name": "f", "arguments": {}})),
        *(call({"function": value}) for value in (None, SECRET, {}, {"name": "f"})),
        call(CALL | {"type": "custom"}),
        parts({"type": "tool_call", "value": SECRET}),
        parts({"type": "tool_call", "value": "[]"}),
        row(conversations=[{"from": "human", "value": SECRET}, {"from": "function_call", "value": "not JSON"}]),
        row(conversations=[{"from": "human", "value": SECRET}, {"from": "function_call", "value": None}]),
        row(conversations=[{"from": "human", "value": SECRET}, {"from": "function_call", "value": DEEP}]),
    ],
    "blank_tool_name": [call({"name": "", "arguments": {}}), call({"name": " ", "arguments": "{}"})],
    "call_arguments_not_json": [
        *(
            call({"name": "f", "arguments": value})
            for value in (
                "",
                SECRET,
                "{'x': 1}",
                '{"x": NaN}',
                '{"x": 1e400}',
                '{"x": "\\ud800"}',
                '{"\ud800": 1}',
                DEEP,
            )
        ),
        call({"name": "f", "arguments": '{"x": 1, "x": 2}'}),
        call({"name": "f", "arguments": '{"y": [{"x": 1, "x": 2}]}'}),
        call({"name": "f", "arguments": '{"x": %s}' % ("9" * 5_000)}),
        call({"name": "f", "arguments": {"x": float("nan")}}),
        call({"name": "f", "arguments": {"x": "\ud800"}}),
        call({"name": "f", "arguments": {"x": 10**5_000}}),
        call({"name": "f", "arguments": {"x": b"bytes of a column"}}),
        call({"name": "f", "arguments": NESTED}),
    ],
    "call_arguments_not_an_object": [call({"name": "f", "arguments": value}) for value in (None, 3, [], "[]", "null")],
    "duplicate_call_id": [answer(None, tool_calls=[CALL, CALL])],
    "field_not_text": [
        call({"name": "f", "arguments": {}, "id": 3}),
        answer(reasoning_content=3),
        answer(thinking=True),
        chat(U, ASK, turn("tool", tool_call_id=1), A),
        chat(U, ASK, turn("tool", name=[SECRET]), A),
    ],
    "field_of_another_role": [
        chat(U | {"tool_calls": [CALL]}, A),
        chat(U | {"reasoning": SECRET}, A),
        chat(U | {"name": SECRET}, A),
        answer(tool_call_id=SECRET),
        chat(U, ASK, result("c1") | {"function_call": {"name": "f", "arguments": {}}}, A),
        parts({"type": "reasoning", "text": SECRET}, role="user"),
        parts({"type": "tool_call", "value": "{}"}, role="user"),
        parts({"type": "tools", "value": "[]"}, role="user"),
    ],
    "conflicting_fields": [
        answer(weight=1, train=False),
        answer(loss_weight=0.5, weight=1),
        answer(reasoning=SECRET, thinking="otherwise"),
        answer([{"type": "thinking", "text": SECRET}, TEXT], thinking="otherwise"),
        answer(None, tool_calls=[CALL], function_call={"name": "f", "arguments": {}}),
        answer([{"type": "tool_call", "value": {"name": "f", "arguments": {}}}], tool_calls=[CALL]),
        chat(U, A, tools=[{}], functions=[{}]),
        chat(turn("system", [{"type": "tools", "tools": [{}]}]), U, A, tools=[{}]),
        row(conversations=[{"from": "human", "value": SECRET, "role": "user"}]),
    ],
    "bad_weight": [
        *(answer(weight=value) for value in (0.5, 2, -1, True, "1", float("nan"))),
        *(answer(loss_weight=value) for value in (-0.1, float("nan"), float("inf"), 1e7, 10**400, "1", True, [1])),
        *(answer(train=value) for value in (1, 0, "true")),
        chat(U | {"weight": "0"}, A),
    ],
    "weight_on_context": [
        chat(U | {"weight": 1}, A),
        chat(S | {"train": True}, U, A),
        chat(U, ASK, result("c1") | {"loss_weight": 0.5}, A),
        row(prompt=[U, A | {"weight": 1}, U], completion=SECRET),
    ],
    "bad_tools": [
        *(chat(U, A, tools=value) for value in ({"name": "f"}, SECRET, 3, True, [SECRET], [None], '{"a": 1}', "[3]")),
        chat(U, A, tools=DEEP),
        chat(U, A, functions='[{"a": 1, "a": 2}]'),
        chat(turn("system", [{"type": "tools", "tools": SECRET}]), U, A),
    ],
    "unsupported_field": [
        chat(U, A, weight=0),
        chat(U, A, train=False),
        chat(U, A, chat_template=SECRET),
        row(prompt=SECRET, completion=SECRET, history=[[SECRET, SECRET]]),
        row(text=SECRET, tools=[{"name": "f"}]),
        chat(U | {"anything": "a template could show this"}, A),
        call({"name": "f", "arguments": {}, "index": 0}),
        call({"function": {"name": "f", "arguments": {}, "strict": True}}),
        parts({"type": "text", "text": SECRET, "cache_control": {"type": "ephemeral"}}),
    ],
    "wrong_format": [
        row(),
        row(question=SECRET, answer=SECRET),
        row(prompt=SECRET),
        row(text=SECRET, prompt=SECRET + "?", completion="b"),
        chat(U, A, prompt=SECRET),
        chat(U, A, conversations=[]),
    ],
    "preference_pair": [
        row(prompt=SECRET, chosen=SECRET, rejected=SECRET),
        chat(U, A, chosen=SECRET, rejected=SECRET),
        row(prompt=SECRET, completion=SECRET, label=False),
    ],
    "conversation_tree": [row(message_tree_id=SECRET, prompt={"text": SECRET, "replies": []})],
}
OF_OTHER_ROOMS = {"template_leaves_out", "malformed_json", "not_utf8", "duplicate_key", "not_an_object"}
OF_OTHER_ROOMS |= {"nested_too_deep", "row_too_large", "not_json"}
OF_OTHER_ROOMS |= {"template", "unknown_token", "too_long", "nothing_supervised"}
