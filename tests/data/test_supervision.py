"""Which tokens are trained, and how much: turns by weight, reasoning, tool calls, prompts, averaging."""

import json

import numpy as np
import pytest

from sft_jax.data.errors import RowError
from sft_jax.data.rendering import Renderer, RenderOptions
from sft_jax.data.template_probe import check_reasoning_is_chosen
from sft_jax.data.templates import ChatTemplate
from sft_jax.data.tokenizer import load_tokenizer
from sft_jax.datatypes import ConfigError, Conversation, Message, Origin, ToolCall

ORIGIN = Origin("chats.jsonl", 7)
# Reasoning of the last turn only, calls, results as user turns, and a generation prompt that can close the reasoning.
THINKING = """{%- if tools -%}{{- '<|im_start|>system\\n' + tools | tojson + '<|im_end|>\\n' -}}{%- endif -%}
{%- for m in messages -%}
{{- '<|im_start|>' + ('user' if m.role == 'tool' else m.role) + '\\n' -}}
{%- if m.role == 'assistant' and loop.last -%}
    {{- '<think>\\n' + (m.reasoning_content or '') + '\\n</think>\\n\\n' -}}
{%- endif -%}
{{- m.content -}}
{%- for c in m.tool_calls or [] -%}
    {{- '<call>' + c.function.name + ' ' + c.function.arguments | tojson + '</call>' -}}
{%- endfor -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\\n' + ('<think>\\n' if think is defined and think else '') -}}
{%- endif -%}"""
CALL = ToolCall("get_weather", {"city": "Paris"}, '{"city": "Paris"}', id="c1")
TOOLS = ({"name": "get_weather", "description": "Weather of a city."},)
KEEPING = THINKING.replace(" and loop.last", "")


def user(content):
    return Message("user", content)


def assistant(content, **fields):
    return Message("assistant", content, **fields)


def row(*messages, tools=()):
    return Conversation(messages, ORIGIN, tools)


WEATHER = row(
    user("Weather?"),
    assistant("", reasoning="Ask the tool.", tool_calls=(CALL,)),
    Message("tool", "Sunny, 20.", tool_call_id="c1", name="get_weather"),
    assistant("It is sunny.", reasoning="Now answer."),
    tools=TOOLS,
)
TWO = row(user("One?"), assistant("1."), user("Two?"), assistant("2."))


def open_renderer(folder, text=THINKING, kwargs=None, **options):
    tokenizer = load_tokenizer(folder)
    return Renderer(
        tokenizer, ChatTemplate("t.jinja", text, tokenizer.special_tokens, kwargs or {}), RenderOptions(**options)
    )


def weights_of(example):
    return np.concatenate([[0.0], example.loss_weights])


def runs(renderer, example):
    """(weight, text) of each stretch of equal weight."""
    ids, weights = example.ids, weights_of(example)
    starts = np.flatnonzero(np.diff(weights)) + 1
    return [
        (float(weights[part[0]]), renderer.tokenizer.decode(ids[part].tolist(), continuation=True))
        for part in np.split(np.arange(len(ids)), starts)
    ]


def trained(renderer, example):
    return [text for weight, text in runs(renderer, example) if weight]


@pytest.fixture
def folder(tiny_byte_level):
    return tiny_byte_level


def test_calls_and_reasoning_are_trained_and_results_are_not(folder):
    renderer = open_renderer(folder)
    rendered, counts = renderer.render_row(WEATHER)
    first, second = (one.example for one in rendered)  # the template forgets the reasoning of the first turn
    arguments = json.dumps(CALL.arguments)
    assert trained(renderer, first) == [
        f"<think>\nAsk the tool.\n</think>\n\n<call>get_weather {arguments}</call><|im_end|>"
    ]
    assert trained(renderer, second) == ["<think>\nNow answer.\n</think>\n\nIt is sunny.<|im_end|>"]
    assert "Sunny, 20." in runs(renderer, second)[0][1]
    assert counts == {"expanded": 1}
    for example, turn in ((first, 1), (second, 3)):
        start = int(np.flatnonzero(weights_of(example))[0])
        assert example.ids[:start].tolist() == renderer.prompt_ids(WEATHER.messages[:turn], TOOLS)


def test_the_prelude_that_a_template_writes_is_trained(folder):
    renderer = open_renderer(folder, KEEPING)
    (example,) = renderer.render(row(user("Hi"), assistant("Yo")))
    assert trained(renderer, example) == ["<think>\n\n</think>\n\nYo<|im_end|>"]


def test_reasoning_can_be_read_only(folder):
    renderer = open_renderer(folder, KEEPING, train_reasoning=False)
    (example,) = renderer.render(WEATHER)
    assert trained(renderer, example) == [
        "<think>\n",
        '\n</think>\n\n<call>get_weather {"city": "Paris"}</call><|im_end|>',
        "<think>\n",
        "\n</think>\n\nIt is sunny.<|im_end|>",
    ]
    plain = open_renderer(folder, KEEPING).render(WEATHER)[0]
    assert example.ids.tolist() == plain.ids.tolist()


def test_reasoning_is_found_behind_its_mark(folder):
    text = KEEPING.replace("<think>", "<reason>").replace("</think>", "</reason>")  # no control tokens
    renderer = open_renderer(folder, text, train_reasoning=False)
    (example,) = renderer.render(row(user("Hi"), assistant("Yo", reasoning="reason")))
    assert trained(renderer, example) == ["<reason>\n", "\n</reason>\n\nYo<|im_end|>"]


def test_reasoning_that_cannot_be_told_apart_is_refused(folder):
    for text in (
        KEEPING.replace("(m.reasoning_content or '')", "(m.reasoning_content or '') | tojson"),
        KEEPING.replace("'<think>\\n' + ", "").replace("'\\n</think>\\n\\n'", "'\\n'"),
    ):
        assert text != KEEPING
        renderer = open_renderer(folder, text, train_reasoning=False)
        with pytest.raises(RowError, match=r"cannot be told from the answer\. Set config"):
            renderer.render(row(user("Hi"), assistant("Yo", reasoning='Say "Yo".')))


def test_turns_by_weight(folder):
    renderer = open_renderer(folder, KEEPING)
    messages = (TWO.messages[0], TWO.messages[1]._replace(loss_weight=0.25), *TWO.messages[2:])
    (example,) = renderer.render(row(*messages))
    assert [weight for weight, _ in runs(renderer, example)] == [0, 0.25, 0, 1, 0]
    (example,) = renderer.render(row(messages[0], messages[1]._replace(loss_weight=0.0), *messages[2:]))
    assert [weight for weight, _ in runs(renderer, example)] == [0, 1, 0]
    assert example.ids.tolist() == renderer.render(TWO)[0].ids.tolist()


@pytest.mark.parametrize(("supervise", "expected"), [("all", 2), ("last", 1), ("weighted", 1)])
def test_which_turns(folder, supervise, expected):
    renderer = open_renderer(folder, KEEPING, supervise=supervise)
    messages = (*TWO.messages[:3], TWO.messages[3]._replace(loss_weight=1.0))
    (example,) = renderer.render(row(*messages))
    assert len(trained(renderer, example)) == expected
    assert trained(renderer, example)[-1].endswith("2.<|im_end|>")


def test_nothing_supervised_is_a_named_reason(folder):
    for supervise, weight in (("weighted", None), ("all", 0.0)):
        renderer = open_renderer(folder, supervise=supervise)
        with pytest.raises(RowError, match="no turn of a weight above 0") as error:
            renderer.render(row(user("Hi"), assistant("Yo", loss_weight=weight)))
        assert error.value.reason == "nothing_supervised"


def test_an_untrained_turn_needs_no_example(folder):
    """Its history is rewritten, and nobody asks for it."""
    renderer = open_renderer(folder)
    messages = (TWO.messages[0], TWO.messages[1]._replace(loss_weight=0.0), *TWO.messages[2:])
    assert len(renderer.render(row(*messages))) == 1
    assert len(renderer.render(TWO)) == 2


def test_prompt_weights(folder):
    renderer = open_renderer(folder, KEEPING, prompt_loss_weight=0.5)
    (example,) = renderer.render(TWO)
    assert [weight for weight, _ in runs(renderer, example)[1:]] == [
        0.5,
        1,
        0.5,
        1,
        0,
    ]  # the first id is never a target
    (example,) = renderer.render(WEATHER)
    for weight, text in runs(renderer, example):
        assert weight == 0 or "Sunny" not in text  # a tool result is never trained
    assert [weight for weight, _ in runs(renderer, example)[1:]] == [0.5, 1, 0, 1, 0]


def test_an_untrained_answer_is_no_prompt(folder):
    """The row says that it is wrong: no weight of prompts brings it back."""
    renderer = open_renderer(folder, KEEPING, prompt_loss_weight=0.5)
    messages = (TWO.messages[0], TWO.messages[1]._replace(loss_weight=0.0), *TWO.messages[2:])
    (example,) = renderer.render(row(*messages))
    assert trained(renderer, example) == ["<think>\n\n</think>\n\n2.<|im_end|>"]


def test_a_repeated_prompt_is_weighted_once(folder):
    renderer = open_renderer(folder, prompt_loss_weight=0.5)
    first, second = renderer.render(TWO)
    assert {0.5, 1.0} < set(weights_of(first).tolist())
    assert set(weights_of(second).tolist()) == {0.0, 1.0}


def test_averaging_by_example(folder):
    renderer = open_renderer(folder, KEEPING, averaging="example")
    for conversation in (TWO, WEATHER, row(user("Hi"), assistant("Yo", loss_weight=0.5))):
        (example,) = renderer.render(conversation)
        (plain,) = open_renderer(folder, KEEPING).render(conversation)
        assert example.loss_weights.sum() == pytest.approx(1, abs=1e-6)
        ratio = plain.loss_weights[plain.loss_weights > 0] / example.loss_weights[plain.loss_weights > 0]
        assert np.ptp(ratio) < 1e-4


# --- What a template leaves out --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "conversation", "missing"),
    [
        (THINKING.replace("m.reasoning_content or ''", "''"), WEATHER, "the reasoning of message 2"),
        (
            THINKING.replace("c.function.arguments | tojson", "''"),
            WEATHER,
            "the arguments of call 1 of message 2",
        ),
        (THINKING.replace("tools | tojson", "''"), WEATHER, "the row's tools"),
        (
            THINKING.replace("m.content -", "m.content if m.role != 'tool' else '' -"),
            WEATHER,
            "message 3, of role tool",
        ),
        (
            THINKING.replace("m.content -", "m.content if not m.tool_calls else '' -"),
            row(user("Hi"), assistant("Wait.", tool_calls=(CALL,)), tools=TOOLS),
            "the content of message 2, which calls tools",
        ),
    ],
)
def test_text_that_a_template_leaves_out(folder, text, conversation, missing):
    with pytest.raises(RowError, match=f"chats.jsonl:7: chat template t.jinja leaves out {missing}") as error:
        open_renderer(folder, text).render(conversation)
    assert error.value.reason == "template_leaves_out"


def test_a_turn_that_does_not_begin_with_its_prompt(folder):
    text = THINKING.replace("m.role == 'assistant' and loop.last", "m.role == 'assistant' and m.content != 'odd'")
    renderer = open_renderer(folder, text, {"think": True})
    with pytest.raises(RowError, match=r"message 2: .* first goes on with '<think>.n', the second with 'odd<|im_end|>"):
        renderer.render(row(user("Hi"), assistant("odd")))


def test_a_stop_token_after_the_answer_s_own_is_refused(folder):
    text = KEEPING + "{{ '<|im_start|>system\\nStay safe.<|im_end|>' if messages[-1].role == 'assistant' else '' }}"
    with pytest.raises(RowError, match=r"message 2: is followed by '<\|im_end\|>' more than once. Choose"):
        open_renderer(folder, text).render(row(user("Hi"), assistant("Yo")))


def test_calls_may_end_in_a_token_of_their_own(folder, tmp_path):
    text = THINKING.replace("{{- '<|im_end|>\\n' -}}", "{{- '<|call|>' if m.tool_calls else '<|im_end|>' -}}")
    with pytest.raises(RowError, match=r"writes '<\|call\|>' around calls of tools, which .*new_tokens, as \('<\|call"):
        open_renderer(folder, text).render(WEATHER)
    tokenizer = load_tokenizer(folder, ("<|call|>",))
    renderer = Renderer(tokenizer, ChatTemplate("t.jinja", text, tokenizer.special_tokens, {}))
    first, second = renderer.render(WEATHER)
    assert trained(renderer, first)[0].endswith("</call><|call|>")
    assert trained(renderer, second)[0].endswith("It is sunny.<|im_end|>")
    assert renderer.stop_ids == tuple(map(tokenizer.token_id, ("<|im_end|>", "<|call|>")))


# --- Which form of a generation prompt -------------------------------------------------------------------------------


def test_a_generation_prompt_that_opens_reasoning_must_be_chosen(folder):
    text = THINKING.replace("think is defined and think", "think is not defined or think")

    def check(**kwargs):
        renderer = open_renderer(folder, text, kwargs)
        check_reasoning_is_chosen(renderer.template, renderer.facts.reasoning)
        return renderer

    with pytest.raises(ConfigError, match=r"writes '<think>', and its variable think .* dict\(think=True\), or False"):
        check()
    opened, closed = check(think=True), check(think=False)
    conversation = row(user("Hi"), assistant("Yo", reasoning="Greet."))
    assert trained(opened, opened.render(conversation)[0]) == ["Greet.\n</think>\n\nYo<|im_end|>"]
    assert trained(closed, closed.render(conversation)[0]) == ["<think>\nGreet.\n</think>\n\nYo<|im_end|>"]
    tokenizer = load_tokenizer(folder)  # as exported: the choice stands in the template
    exported = ChatTemplate("export", opened.template.text, tokenizer.special_tokens, {})
    check_reasoning_is_chosen(exported, opened.facts.reasoning)


def test_a_generation_prompt_that_leaves_reasoning_to_the_model_is_no_choice(folder):
    renderer = open_renderer(folder)
    assert tuple(renderer.facts.reasoning) == ("<think>", "</think>")
    check_reasoning_is_chosen(renderer.template, renderer.facts.reasoning)
