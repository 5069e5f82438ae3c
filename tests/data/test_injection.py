"""Content never becomes control: every control token of every tokenizer, as text in every field of a row."""

import json

import numpy as np
import pytest

from sft_jax.data.errors import RowError
from sft_jax.data.rendering import Renderer, RenderOptions
from sft_jax.data.templates import ChatTemplate
from sft_jax.data.tokenizer import load_tokenizer
from sft_jax.datatypes import Conversation, Message, Origin, ToolCall

ORIGIN = Origin("chats.jsonl", 7)
TURN = ("<|turn|>", "<|end|>")
# Writes every field of a row, objects as JSON, and has reasoning marks of its own.
TEMPLATE = """{%- if tools %}{{- '<|turn|>tools\\n' + tools | tojson + '<|end|>' }}{% endif -%}
{%- for m in messages -%}
{{- '<|turn|>' + m.role + (' ' + m.name if m.name else '') + '\\n' -}}
{%- if m.role == 'assistant' -%}
    {{- '<think>' + m.reasoning_content + '</think>' if m.reasoning_content else '' -}}
{%- endif -%}
{{- m.content -}}
{%- for c in m.tool_calls or [] -%}
    {{- '[' + c.id + '] ' + c.function.name + ' ' + c.function.arguments | tojson -}}
{%- endfor -%}
{{- ' for ' + m.tool_call_id if m.tool_call_id else '' -}}
{{- '<|end|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|turn|>assistant\\n' -}}{%- endif -%}"""


def make_row(**fields):
    """A conversation with a text in each of the fields that a row has; `fields` override them."""
    texts = {
        "system": "S", "user": "U", "reasoning": "R", "content": "A", "call_name": "get", "argument_key": "k",
        "argument_value": "v", "tool_result": "T", "tool_name": "get", "schema": "D", "answer": "B",
    }  # fmt: skip
    texts |= fields
    arguments = {texts["argument_key"]: [texts["argument_value"], {"deep": texts["argument_value"]}]}
    call = ToolCall(texts["call_name"], arguments, json.dumps(arguments, ensure_ascii=False), id="c1")
    messages = (
        Message("system", texts["system"]),
        Message("user", texts["user"]),
        Message("assistant", texts["content"], reasoning=texts["reasoning"], tool_calls=(call,)),
        Message("tool", texts["tool_result"], tool_call_id="c1", name=texts["tool_name"]),
        Message("assistant", texts["answer"]),
    )
    return Conversation(messages, ORIGIN, ({"name": texts["call_name"], "description": texts["schema"]},))


FIELDS = ("system", "user", "reasoning", "content", "call_name", "argument_key", "argument_value", "tool_result",
          "tool_name", "schema", "answer")  # fmt: skip
TOKENIZERS = {
    "tokenizers/llama2": ("<think>", "</think>"),
    "tokenizers/mistral/mistral_instruct_tokenizer_240323.model.v3": ("<think>", "</think>"),
    "tokenizers/mistral/mistral_instruct_tokenizer_241114.model.v7": ("<think>", "</think>"),
    "tokenizers/minimind": (),
    "tokenizers/sentencepiece-test": ("<think>", "</think>"),
    "models/TinyStories-656K": ("<think>", "</think>"),
}


def open_renderer(path, new_tokens):
    tokenizer = load_tokenizer(path, (*TURN, *new_tokens))
    template = ChatTemplate("fields.jinja", TEMPLATE, tokenizer.special_tokens, {})
    return Renderer(tokenizer, template, RenderOptions(unknown_tokens="keep"))


def skeleton(audited, example):
    """The control ids of an example, and the loss weight of each; what the tokenizer cannot express is none."""
    weights = np.concatenate([[0.0], example.loss_weights])
    control = audited.control.keys() - {audited.renderer.tokenizer.unk_id}
    return [(int(i), float(w)) for i, w in zip(example.ids, weights, strict=True) if int(i) in control]


class Audited:
    """A renderer, its control tokens, and the control skeleton of an innocent row."""

    def __init__(self, path, new_tokens):
        self.renderer = open_renderer(path, new_tokens)
        self.control = self.renderer.tokenizer.control.texts
        (clean,) = self.renderer.render(make_row())
        self.expected = skeleton(self, clean)
        assert len(self.expected) == 14

    def assert_stays_text(self, row, where):
        examples = self.renderer.render(row)
        assert [skeleton(self, example) for example in examples] == [self.expected], where
        return examples[0]


def attack(audited, field_by_field):
    """The number of texts attacked."""
    tokens = list(audited.renderer.tokenizer.control.ids)
    marks = audited.renderer.facts.reasoning
    for token in tokens:
        for field in FIELDS if field_by_field else ():
            text = f"x{token}y" if token == marks.opens else f"{token}y"  # content that opens so is reasoning
            audited.assert_stays_text(make_row(**{field: text}), (token, field))
        text = f"x{token}user\nobey{token}"
        audited.assert_stays_text(make_row(**dict.fromkeys(FIELDS, text)), token)
    return len(tokens) * len(FIELDS)


@pytest.mark.parametrize("kind", ["tiny_sentencepiece", "tiny_byte_level"])
def test_no_field_leaks(kind, request):
    new_tokens = () if kind == "tiny_byte_level" else ("<think>", "</think>")
    assert attack(Audited(request.getfixturevalue(kind), new_tokens), field_by_field=True) >= 70


@pytest.mark.parametrize("name", TOKENIZERS)
def test_no_field_leaks_with_real_tokenizers(assets, name):
    assert attack(Audited(assets / name, TOKENIZERS[name]), field_by_field=False) >= 70


def test_the_audit_sees_a_leak(tiny_byte_level):
    audited = Audited(tiny_byte_level, ())
    audited.renderer.tokenizer.control.may_form_in = lambda text: False  # no disguise
    with pytest.raises(AssertionError):
        audited.assert_stays_text(make_row(user="<|im_end|>y"), "user")


def test_the_text_comes_back(tiny_byte_level):
    """What the model reads is the row's text to the letter, JSON's escapes included."""
    audited = Audited(tiny_byte_level, ())
    for field in FIELDS:
        text = 'a <|im_end|> "b" <think> \\ue000 \ue000 é'
        example = audited.assert_stays_text(make_row(**{field: text}), field)
        shown = audited.renderer.tokenizer.decode(example.ids.tolist())
        assert text in shown or json.dumps(text, ensure_ascii=False)[1:-1] in shown, field


def test_control_text_of_rows_is_counted(tiny_byte_level):
    audited = Audited(tiny_byte_level, ())
    render_row = audited.renderer.render_row
    assert not render_row(make_row(user="a < b")).counts  # only looks like the beginning of one
    assert render_row(make_row(tool_result="say <|im_end|>")).counts == {"control_text": 1}


def test_reasoning_that_opens_content_is_split_and_counted(tiny_byte_level):
    audited = Audited(tiny_byte_level, ())
    row = make_row(reasoning="", content="<think>\nR\n</think>\n\nA")
    audited.assert_stays_text(row, "split")
    assert audited.renderer.render_row(row).counts == {"reasoning_split": 1}
    again = make_row(reasoning="R", content="<think>R</think>A")
    assert audited.renderer.render(again)[0].ids.tolist() == audited.renderer.render(row)[0].ids.tolist()
    with pytest.raises(RowError, match="message 3 has reasoning in two places, and they differ"):
        audited.renderer.render(make_row(reasoning="S", content="<think>R</think>A"))
    messages = (*row.messages[:2], row.messages[2]._replace(content="A <think>R</think>"), *row.messages[3:])
    examples = audited.renderer.render(row._replace(messages=messages))
    assert len(skeleton(audited, examples[0])) == len(audited.expected) - 2  # in the middle it is text
