"""Control tokens that a template means and a tokenizer lacks are asked for; what is plain text to it is left alone."""

import re

import pytest
from chats import CONTROL_TOKENS

from sft_jax.data.errors import RowError
from sft_jax.data.rendering import Renderer
from sft_jax.data.template_probe import heads_of_difference
from sft_jax.data.templates import ChatTemplate, load_template
from sft_jax.data.tokenizer import load_tokenizer
from sft_jax.datatypes import ConfigError, Conversation, Message, Origin, ToolCall

ORIGIN = Origin("chats.jsonl", 7)
CALL = ToolCall("f", {"x": 1}, '{"x": 1}', id="call00001")
PLAIN = Conversation((Message("user", "Hi"), Message("assistant", "Yo")), ORIGIN)
CALLING = Conversation((Message("user", "Hi"), Message("assistant", "", tool_calls=(CALL,))), ORIGIN)
OFFERING = Conversation(PLAIN.messages, ORIGIN, ({"type": "function", "function": {"name": "f", "parameters": {}}},))


def open_renderer(folder, name="", text="", new_tokens=()):
    tokenizer = load_tokenizer(folder, new_tokens)
    if name:
        return Renderer(tokenizer, load_template(name, tokenizer, {}))
    return Renderer(tokenizer, ChatTemplate("t.jinja", text, tokenizer.special_tokens, {}))


@pytest.mark.parametrize("name", ["mistral-v3", "mistral-v7"])
def test_mistral_s_brackets_are_control_tokens(tiny_sentencepiece, name):
    with pytest.raises(ConfigError, match=rf"{name} writes '\[INST\]', '\[/INST\]'.* as single tokens.*new_tokens, as"):
        open_renderer(tiny_sentencepiece, name)
    first = ("[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]")
    renderer = open_renderer(tiny_sentencepiece, name, new_tokens=first)
    (example,) = renderer.render(PLAIN)
    assert renderer.tokenizer.token_id("[/INST]") in example.ids
    for row in (CALLING, OFFERING):  # plain rows do not need the tokens of tools
        with pytest.raises(RowError, match=r"writes '\[AVAILABLE_TOOLS\]', .* around calls of tools.*new_tokens, as"):
            renderer.render(row)
    renderer = open_renderer(tiny_sentencepiece, name, new_tokens=CONTROL_TOKENS[name])
    assert renderer.facts.lacking == ()
    assert renderer.tokenizer.token_id("[TOOL_CALLS]") in renderer.render(CALLING)[0].ids


@pytest.mark.parametrize("name", ["llama2", "mistral-v1"])
def test_brackets_of_llama2_and_the_first_mistral_are_text(tiny_sentencepiece, name):
    renderer = open_renderer(tiny_sentencepiece, name)
    (example,) = renderer.render(PLAIN)
    assert renderer.tokenizer.decode(example.ids.tolist()).startswith("<s>[INST] Hi [/INST]")


FOREIGN = """{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + '[/INST]' }}
{%- else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"""


def test_a_foreign_template_means_tokens_by_brackets_if_it_writes_those_that_came_with_them(tiny_sentencepiece):
    assert open_renderer(tiny_sentencepiece, text=FOREIGN).render(PLAIN)
    with_tools = "{% if tools %}{{ '[AVAILABLE_TOOLS]' }}{% endif %}" + FOREIGN
    with pytest.raises(ConfigError, match=r"t\.jinja writes '\[INST\]', '\[/INST\]', which"):
        open_renderer(tiny_sentencepiece, text=with_tools)
    assert open_renderer(tiny_sentencepiece, text=with_tools, new_tokens=("[INST]", "[/INST]")).render(PLAIN)
    other = FOREIGN.replace("[INST]", "[QUESTION]").replace("[/INST]", "[/QUESTION]")
    assert open_renderer(tiny_sentencepiece, text=other).render(PLAIN)


def test_tokens_around_calls_are_asked_for(tiny_sentencepiece):
    renderer = open_renderer(
        tiny_sentencepiece, "granite", new_tokens=[t for t in CONTROL_TOKENS["granite"] if t != "<|tool_call|>"]
    )
    assert renderer.facts.lacking == ("<|tool_call|>",)
    assert renderer.render(PLAIN)
    with pytest.raises(RowError, match=re.escape("writes '<|tool_call|>' around calls of tools")):
        renderer.render(CALLING)


@pytest.mark.parametrize(
    ("prompt", "whole", "heads"),
    [("ab", "axe", ("'b'", "'xe'")), ("abc", "ab", ("'c'", "nothing")), ("a", "abc", ("nothing", "'bc'"))],
)
def test_where_two_texts_part(prompt, whole, heads):
    assert heads_of_difference(prompt, whole) == heads


def test_messages_end_in_one_full_stop_each(tiny_byte_level):
    text = "{% for m in messages %}{{ m.content + '<|im_end|>' }}"
    text += "{% if m.content == 'No' %}{{ raise_exception('It must be another..') }}{% endif %}{% endfor %}"
    renderer = open_renderer(tiny_byte_level, text=text)
    with pytest.raises(RowError) as error:
        renderer.render(Conversation((Message("user", "No"), Message("assistant", "Yo")), ORIGIN))
    assert str(error.value) == (
        "chats.jsonl:7: chat template t.jinja does not take roles [user, assistant]: It must be another. "
        "Fix the row, or choose another template."
    )
