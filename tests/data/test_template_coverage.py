"""What a template leaves out is refused by name, however little of it there is; and only in rows that have it."""

import json

import pytest

from sft_jax.data.errors import RowError
from sft_jax.data.rendering import Renderer
from sft_jax.data.templates import ChatTemplate
from sft_jax.data.tokenizer import load_tokenizer
from sft_jax.datatypes import Conversation, Message, Origin, ToolCall

# Writes everything; each test takes something out.
ALL = """{%- if tools -%}{{- '<|im_start|>system\\n' + tools | tojson + '<|im_end|>' -}}{%- endif -%}
{%- for m in messages -%}
{{- '<|im_start|>' + m.role + '\\n' -}}
{%- if m.reasoning_content -%}{{- '<think>' + m.reasoning_content + '</think>' -}}{%- endif -%}
{%- if m.role == 'tool' -%}{{- (m.name or '') + (m.tool_call_id or '') + ':' -}}{%- endif -%}
{{- m.content -}}
{%- for c in m.tool_calls or [] -%}
    {{- '<call>' + c.function.name + ' ' + (c.id or '') -}}
    {%- for k, v in c.function.arguments | items -%}{{- k + '=' + v | tojson + ';' -}}{%- endfor -%}
    {{- '</call>' -}}
{%- endfor -%}
{{- '<|im_end|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"""


def call(name="f", call_id="", **arguments):
    return ToolCall(name, arguments, json.dumps(arguments), call_id)


def user(content="u"):
    return Message("user", content)


def says(content="a", *calls, reasoning=""):
    return Message("assistant", content, reasoning, calls)


def calls(*calls):
    return says("", *calls)


def result(content="t", call_id="", name=""):
    return Message("tool", content, tool_call_id=call_id, name=name)


def system(content="s"):
    return Message("system", content)


def schema(name="f", properties=None, **fields):
    parameters = {} if properties is None else {"parameters": {"type": "object", "properties": properties}}
    return {"type": "function", "function": {"name": name, **fields, **parameters}}


TOOLS = (schema(),)
A, B = call("f", "c1", x="a"), call("f", "c2", x="a")
EARLIER = says("fine")._replace(loss_weight=0.0)


def instead(old, new):
    assert old in ALL
    return ALL.replace(old, new)


def nested(filtered):
    """Tools, with their parameters written by a template's own hand."""
    return instead("tools | tojson", f"({filtered}) | tojson")


ARGUMENT = "k + '=' + v | tojson"
NAME, DESCRIPTION = "tools[0].function.name", "(tools[0].function.description or '')"
PARAMETERS = "(tools[0].function.parameters or {})"
PROPERTIES = "((tools[0].function.parameters or {}).properties or {})"
START = "[messages | length + (1 if add_generation_prompt else 0) - 4, 0] | max"
LAST_QUESTION = "(messages | selectattr('role', 'equalto', 'user') | list | last)"
ORDERED = ((user(), calls(A, B), result("1", "c1"), result("2", "c2"), says()), TOOLS)
SWAPPED = ((user(), calls(A, B), result("1", "c2"), result("2", "c1"), says()), TOOLS)
NO_MARKS = instead("(m.name or '') + (m.tool_call_id or '')", "''")

# The template, words of the error, a row that loses something (messages, or messages and tools), and one that does not.
LOSSES = {
    "second call": (instead("m.tool_calls or []", "(m.tool_calls or [])[:1]"), "call 2 of message 2",
        (user(), calls(A, A)), (user(), calls(A))),
    "fourth call": (instead("m.tool_calls or []", "(m.tool_calls or [])[:3]"), "call 4 of message 2",
        (user(), calls(A, A, A, A)), (user(), calls(A, A, A))),
    "calls of later turns": (instead("m.tool_calls or []", "(m.tool_calls if loop.index < 3 else []) or []"),
        "call 1 of message 4", (user(), calls(A), result(), calls(A)), (user(), calls(A))),
    "numbers": (instead(ARGUMENT, "k + '=' + (v if v is not number or v is boolean else '') | tojson"),
        "an argument that is a whole number, of call 1 of message 2",
        (user(), calls(call(name="f2", x=2))), (user(), calls(call(x="2", y=True)))),
    "fractions": (instead(ARGUMENT, "k + '=' + (v | int if v is float else v) | tojson"),
        "an argument that is a fraction, of", (user(), calls(call(name="f2.5", x=2.5))), (user(), calls(call(x=2)))),
    "booleans": (instead(ARGUMENT, "k + '=' + (v if v is not boolean else '') | tojson"),
        "an argument that is true", (user(), calls(call(name="true", x=True))), (user(), calls(call(x=1, y="true")))),
    "what is falsy": (instead(ARGUMENT, "k + '=' + (v or '') | tojson"),
        "an argument that is zero", (user(), calls(call(name="f0", x=0))), (user(), calls(call(x=10)))),
    "null": (instead(ARGUMENT, "k + '=' + ('' if v is none else v) | tojson"),
        "an argument that is null", (user(), calls(call(name="null", x=None))), (user(), calls(call(x=0)))),
    "numbers within": (instead(ARGUMENT, "k + '=' + (v.keys() | list if v is mapping else v) | tojson"),
        "an argument that is an object", (user(), calls(call(name="f7", x={"y": 7}))), (user(), calls(call(x=[7])))),
    "all arguments": (instead(ARGUMENT, "''"),
        "the arguments of call 1 of message 2", (user(), calls(call(name="x", x="x"))), (user(), calls(call()))),
    "reasoning beside calls": (instead("if m.reasoning_content", "if m.reasoning_content and not m.tool_calls"),
        "the reasoning of message 2", (user(), says("a", A, reasoning="a")), (user(), says("a", reasoning="a"))),
    "content beside calls": (instead("m.content -", "('' if m.tool_calls else m.content) -"),
        "the content of message 2, which calls tools", (user(), says("f", A)), (user(), calls(A))),
    "system beside tools": (instead("m.content -", "('' if tools and m.role == 'system' else m.content) -"),
        "message 1, of role system", ((system(), user(), says()), TOOLS), ((system(), user(), says()), ())),
    "a second system message": (instead("m.content -", "(m.content if m.role != 'system' or loop.first else '') -"),
        "message 3, of role system", (system(), user(), system("b"), user(), says()), (system(), user(), says())),
    "all but the last four": (instead("in messages", f"in messages[{START}:]"), "message 1, of role user",
        (user(), says(), user(), says(), user(), says()), (user(), says(), user(), says())),
    "earlier questions": (
        instead("m.content -", f"(m.content if m.role != 'user' or m == {LAST_QUESTION} else '') -"),
        "message 1, of role user", (user("s"), says(), user(), says()), (user(), says())),
    "earlier answers": (instead("m.content -", "(m.content if m.role != 'assistant' or loop.last else '') -"),
        "message 2, of role assistant, in the prompts after it",
        (user(), EARLIER, user(), says()), (user(), says())),
    "a second result": (
        instead("m.content -", "(m.content if m.role != 'tool' or loop.previtem.role != 'tool' else '') -"),
        "message 4, of role tool", ORDERED, (user(), calls(A), result(), says())),
    "order of results": (NO_MARKS, "which call is answered by message 3", SWAPPED, ORDERED),
    "tools": (instead("tools | tojson", "''"), "the row's tools",
        ((user("f"), says()), TOOLS), (user("f"), says())),
    "a second tool": (instead("tools | tojson", "tools[:1] | tojson"), "the row's tools",
        ((user("g"), says()), (*TOOLS, schema("g"))), ((user("g"), says()), TOOLS)),
    "descriptions": (nested(f"[{NAME}, {PARAMETERS}]"), "the description of the row's tools",
        ((user(), says()), (schema(description="f"),)), ((user(), says()), (schema(properties={"f": {}}),))),
    "parameters": (nested(f"[{NAME}, {DESCRIPTION}]"), "the parameters of the row's tools",
        ((user(), says()), (schema(properties={"f": {}}),)), ((user(), says()), (schema(description="f"),))),
    "more of parameters": (nested(f"[{NAME}, {DESCRIPTION}, {PROPERTIES} | list]"),
        "descriptions of the parameters of the row's tools",
        ((user(), says()), (schema(properties={"f": {"description": "f"}}),)),
        ((user(), says()), (schema(properties={"f": {"type": "string"}}, description="f"),))),
}  # fmt: skip


def with_tools(row):
    return (row, ()) if not row or isinstance(row[0], Message) else row


def render(folder, text, row):
    tokenizer = load_tokenizer(folder)
    template = ChatTemplate("t.jinja", text, tokenizer.special_tokens, {})
    messages, tools = with_tools(row)
    try:
        return Renderer(tokenizer, template).render(Conversation(tuple(messages), Origin("a.jsonl", 7), tuple(tools)))
    finally:
        template.close()


@pytest.mark.parametrize("loss", LOSSES)
def test_what_is_left_out_is_refused_by_name(tiny_byte_level, loss):
    text, words, losing, keeping = LOSSES[loss]
    assert render(tiny_byte_level, ALL, losing)
    assert render(tiny_byte_level, ALL, keeping)
    assert render(tiny_byte_level, text, keeping)
    with pytest.raises(RowError) as error:
        render(tiny_byte_level, text, losing)
    assert error.value.reason == "template_leaves_out"
    message = str(error.value)
    assert message.startswith(f"a.jsonl:7: chat template t.jinja leaves out {words}"), message
    assert message.endswith("config.data.policies = dict(template_leaves_out='drop').")


def test_choices_and_parameters_within_parameters(tiny_byte_level):
    """One template, which writes of each parameter the name and the description."""
    inner = f"{{% set found = namespace(x=[]) %}}{{% for k, v in ({PROPERTIES} if tools else {{}}) | items %}}"
    inner += "{% set found.x = found.x + [k, v.description or ''] %}{% endfor %}"
    text = inner + nested(f"[{NAME}, {DESCRIPTION}, found.x]")
    plain = {"x": {"type": "string", "description": "An x."}}
    assert render(tiny_byte_level, text, ((user(), says()), (schema(properties=plain, description="f"),)))
    for value, words in (
        ({"enum": ["x"]}, r"choices \(enum\) of the parameters"),
        ({"type": "object", "properties": {"x": {}}}, "parameters within parameters"),
    ):
        with pytest.raises(RowError, match=f"leaves out {words} of the row's tools"):
            render(tiny_byte_level, text, ((user(), says()), (schema(properties={"x": value}),)))


def test_values_are_held_against_the_row_too(tiny_byte_level):
    """What hangs on a value, no stand-in can show."""
    for text, row, words in (
        (instead("m.content -", "m.content[:30] -"), (user("word " * 9), says()), "message 1, of role user"),
        (instead("m.content -", "m.content[:30] -"), (user(), says("word " * 9)), "the content of message 2"),
        (instead("v | tojson", "(v if v != 12345 else 0) | tojson"), (user(), calls(call(x=12345))), "an argument of"),
        (instead("v | tojson", "(v if v != 'abc' else 0) | tojson"), (user(), calls(call(x=["abc"]))), ""),
    ):
        if not words:
            assert render(tiny_byte_level, text, row)
            continue
        with pytest.raises(RowError, match=f"leaves out {words}"):
            render(tiny_byte_level, text, row)


def test_a_stand_in_is_rendered_once_for_a_shape(tiny_byte_level):
    tokenizer = load_tokenizer(tiny_byte_level)
    template = ChatTemplate("t.jinja", ALL, tokenizer.special_tokens, {})
    coverage = Renderer(tokenizer, template).facts.coverage
    rendered = []
    render_each = template.render_each

    def counted(messages, requests, tools):
        rendered.append(len(requests))
        return render_each(messages, requests, tools)

    template.render_each = counted
    for content in ("Hi", "Ho"):
        assert coverage.what_is_missing((user(content), says(content)), (), [1]) == ""
    assert rendered == [2]
    assert coverage.what_is_missing((user(), says(), user(), says()), (), [1, 3]) == ""
    assert rendered == [2, 2]  # the first turn is known
    assert coverage.what_is_missing((user(), says(), user(), says(" ")), (), [3]) == ""
    assert rendered == [2, 2, 2]
    template.close()


@pytest.mark.parametrize("window", [4, 8, 16])
def test_a_window_on_long_conversations(tiny_byte_level, window):
    text = instead("in messages", f"in messages[{START.replace('4', str(window))}:]")
    contents = [f"What is {k} + {k}?" for k in range(20)]
    row = tuple(message for content in contents for message in (user(content), says("a")))
    assert render(tiny_byte_level, ALL, row)
    assert render(tiny_byte_level, text, row[:window])
    for longer in (window + 2, len(row)):
        with pytest.raises(RowError, match="leaves out message 1, of role user"):
            render(tiny_byte_level, text, row[:longer])


def test_long_conversations_have_shapes_in_common(tiny_byte_level):
    tokenizer = load_tokenizer(tiny_byte_level)
    text = instead("m.tool_calls or []", "(m.tool_calls or [])[:2]")
    template = ChatTemplate("t.jinja", text, tokenizer.special_tokens, {})
    coverage = Renderer(tokenizer, template).facts.coverage
    rounds = [(calls(A), result("1", "c1"))] * 30
    row = [user(), *(message for both in rounds for message in both), says()]
    turns = [i for i, message in enumerate(row) if message.role == "assistant"]
    assert coverage.what_is_missing(row, (), turns) == ""
    template.render_each = None  # all is known of a longer one
    assert coverage.what_is_missing([*row[:1], *row[1:3] * 9, *row[1:]], (), [turns[-1] + 18]) == ""
    del template.render_each
    row[31] = calls(A, B, A)
    assert coverage.what_is_missing(row, (), turns) == "call 3 of message 32"
    template.close()


def test_a_template_that_takes_text_only_in_arguments(tiny_byte_level):
    """It does not take the stand-in with all kinds of values, so one with text does."""
    text = instead("m.tool_calls or []", "(m.tool_calls or [])[:1]").replace("v | tojson", "'' + v")
    assert render(tiny_byte_level, text, (user(), calls(call(x="y"))))
    with pytest.raises(RowError, match="leaves out call 2 of message 2"):
        render(tiny_byte_level, text, (user(), calls(call(x="y"), call(x="y"))))
