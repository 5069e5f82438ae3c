"""Templates render as written down for each format, foreign Jinja is contained, and every refusal says what to do."""

import datetime
import json
import shutil

import pytest

from sft_jax.data.templates import BUILTIN_TEMPLATES, ChatTemplate, TemplateError, load_template
from sft_jax.data.tokenizer import load_tokenizer
from sft_jax.datatypes import ConfigError, Message

CHAT = (
    Message("system", " Be brief. "),
    Message("user", " Hi\n"),
    Message("assistant", "Hello! "),
    Message("user", "Bye"),
    Message("assistant", "  See you."),
)

EXPECTED = {
    "chatml": (
        "<|im_start|>system\n Be brief. <|im_end|>\n<|im_start|>user\n Hi\n<|im_end|>\n"
        "<|im_start|>assistant\nHello! <|im_end|>\n<|im_start|>user\nBye<|im_end|>\n"
        "<|im_start|>assistant\n  See you.<|im_end|>\n"
    ),
    "llama2": (
        "<s>[INST] <<SYS>>\n Be brief. \n<</SYS>>\n\n Hi [/INST] Hello! </s><s>[INST] Bye [/INST] See you. </s>"
    ),
    "llama3": (
        "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nHello!<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nBye<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nSee you.<|eot_id|>"
    ),
    "plain": "<s> Be brief.  Hi\nHello! </s>Bye  See you.</s>",
}
PROMPT = {
    "chatml": "<|im_start|>assistant\n",
    "llama2": "",
    "llama3": "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "plain": "",
}


@pytest.fixture(scope="module")
def tokenizer(tiny_sentencepiece):
    return load_tokenizer(tiny_sentencepiece)


def template(text, **kwargs):
    return ChatTemplate("test.jinja", text, {"bos_token": "<s>", "eos_token": "</s>"}, kwargs)


@pytest.mark.parametrize("name", BUILTIN_TEMPLATES)
def test_built_in_formats(tokenizer, name):
    built_in = load_template(name, tokenizer, {})
    assert built_in.render(CHAT, add_generation_prompt=False) == EXPECTED[name]
    assert built_in.render(CHAT[:2], add_generation_prompt=True).endswith(PROMPT[name])
    assert EXPECTED[name].startswith(built_in.render(CHAT[:2], add_generation_prompt=True))
    assert built_in.render(CHAT[1:3], add_generation_prompt=False)  # no system message


def test_plain_writes_bos_only_where_documents_have_one(tiny_byte_level, tokenizer):
    assert "bos_token" in load_template("plain", tokenizer, {}).text
    assert "bos_token" not in load_template("plain", load_tokenizer(tiny_byte_level), {}).text


@pytest.mark.parametrize("roles", ["assistant", "user user", "system assistant", "user assistant tool"])
def test_llama2_refuses_other_orders(tokenizer, roles):
    messages = [Message(role, "x") for role in roles.split()]
    with pytest.raises(TemplateError, match="user and assistant in turn"):
        load_template("llama2", tokenizer, {}).render(messages, add_generation_prompt=True)


# --- Where a template comes from -------------------------------------------------------------------------------------


def test_the_folder_s_own_template_is_the_default(tiny_sentencepiece, tmp_path):
    shutil.copytree(tiny_sentencepiece, tmp_path / "t")
    (tmp_path / "t" / "chat_template.jinja").write_text("own {{ messages[0]['content'] }}")
    own = load_template("", load_tokenizer(tmp_path / "t"), {})
    assert own.render([Message("user", "x")], add_generation_prompt=False) == "own x"
    assert own.text == "own {{ messages[0]['content'] }}"


def test_without_any_template_the_first_conversation_is_refused(tokenizer):
    nothing = load_template("", tokenizer, {})
    assert nothing.text == ""
    with pytest.raises(
        ConfigError, match=r"config\.data\.chat_template: is empty, and .* Choose one of chatml, llama2"
    ):
        nothing.render(CHAT, add_generation_prompt=False)


def test_a_file(tokenizer, tmp_path):
    path = tmp_path / "mine.jinja"
    path.write_text("{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    mine = load_template(str(path), tokenizer, {})
    assert mine.render(CHAT[1:3], add_generation_prompt=False) == "<s>user:  Hi\n\nassistant: Hello! \n"
    path.write_text(" \n")
    with pytest.raises(ConfigError, match="is empty"):
        load_template(str(path), tokenizer, {})
    with pytest.raises(ConfigError, match=r"'chatlm' is no file and no built-in template\. Did you mean chatml\?"):
        load_template("chatlm", tokenizer, {})
    path.write_text("one\ntwo {% if %}")
    with pytest.raises(ConfigError, match=r"mine\.jinja, line 2: "):
        load_template(str(path), tokenizer, {})


# --- Variables -------------------------------------------------------------------------------------------------------


def test_kwargs_are_variables(tokenizer, tmp_path):
    (tmp_path / "t.jinja").write_text("{{ bos_token }} {{ enable_thinking }}")
    assert (
        load_template(str(tmp_path / "t.jinja"), tokenizer, {"enable_thinking": False}).render([], False) == "<s> False"
    )
    for name in ("messages", "bos_token"):
        with pytest.raises(ConfigError, match=rf"chat_template_kwargs\.{name}: is set by us"):
            load_template("chatml", tokenizer, {name: "x"})


def test_the_exported_text_carries_the_kwargs_as_defaults():
    values = {"a": False, "b": None, "c": 'q"\\\n{{é}}', "d": [1, -2.5, None], "e": {"k": True}, "f": "True"}
    text = "  {% macro show() %}{{ [a, b, c, d, e, f] }}{% endmacro %}{{ show() }}{{ [a, b, c, d, e, f] }}\n\nend\n"
    trained = template(text, **values)
    served = template(trained.text)
    assert served.render([], False) == trained.render([], False) == template(text, **values).render([], False)
    assert repr(list(values.values())) in trained.render([], False)
    assert trained.text.endswith(text)
    assert template(trained.text, a=7).render([], False).count("[7, None") == 2  # the server may still choose
    assert template(text).text == text
    with pytest.raises(ConfigError, match=r"chat_template_kwargs\.x: is \{1\}; expected what JSON can hold"):
        template(text, x={1})


def test_tools_and_documents_are_none():
    assert template("{{ tools is none and documents is none }}").render([], False) == "True"


def test_absent_special_tokens_are_undefined(tiny_byte_level, tmp_path):
    (tmp_path / "t.jinja").write_text("{{ bos_token is defined }} {{ eos_token }}")
    rendered = load_template(str(tmp_path / "t.jinja"), load_tokenizer(tiny_byte_level), {}).render([], False)
    assert rendered == "False <|im_end|>"


def test_the_clock():
    dated = template("{{ strftime_now('%d %b %Y') }}", now="2024-07-26")
    assert dated.render([], False) == "26 Jul 2024"
    assert not dated.reads_clock
    with pytest.raises(ConfigError, match=r"kwargs\.now: is 'tomorrow'; expected a date"):
        template("x", now="tomorrow")
    today = template("{{ strftime_now('%Y') }}")
    assert not today.reads_clock
    assert int(today.render([], False)) >= datetime.date.today().year - 1
    assert today.reads_clock


# --- The dialect -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{% generation %}\na{% endgeneration %}b", "ab"),
        ("{% set x = 1 %}{% generation %}{% set x = 2 %}{% endgeneration %}{{ x }}", "1"),  # a scope of its own
        ("{% for i in range(5) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "01"),
        ("{% for i in range(3) %}{% if i == 1 %}{% continue %}{% endif %}{{ i }}{% endfor %}", "02"),
        ("  {% if true %}\n  x\n  {% endif %}\n", "  x\n"),  # trim_blocks, lstrip_blocks, last newline dropped
        ("{{ {'b': '<é>', 'a': [1]} | tojson }}", '{"b": "<é>", "a": [1]}'),
        ("{{ [1, 2] | tojson(indent=1) }}", "[\n 1,\n 2\n]"),
        ("{{ '<b>' }}", "<b>"),
        ("{% set ns = namespace(n=0) %}{% for i in range(3) %}{% set ns.n = ns.n + i %}{% endfor %}{{ ns.n }}", "3"),
        ("{% macro f(x) %}[{{ x }}{{ bos_token }}]{% endmacro %}{{ f(1) }}", "[1<s>]"),
    ],
)
def test_jinja_as_transformers_sets_it_up(text, expected):
    assert template(text).render([], False) == expected


@pytest.mark.parametrize(
    "text",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages[0].content + nothing }}",
        "{{ 1 / 0 }}",
        "{{ messages[7]['content'] }}",
        "{{ 'a' + 1 }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ range(10**9) }}",
    ],
)
def test_a_template_that_fails_names_itself_and_the_roles(text):
    with pytest.raises(TemplateError, match=r"chat template test\.jinja does not take roles \[user\]: .+"):
        template(text).render([Message("user", "x")], add_generation_prompt=False)


def test_reserved_content_comes_through_untouched():
    content = "{{ 7 * 7 }} {% raw %} <b> \\n \u2028"
    assert template("{{ messages[0]['content'] }}").render([Message("user", content)], False) == content


def test_real_templates_compile_and_render(assets):
    tokenizer = load_tokenizer(assets / "tokenizers/minimind")
    config = json.loads((assets / "tokenizers/minimind/tokenizer_config.json").read_text())
    assert load_template("", tokenizer, {}).text == config["chat_template"]
    paths = [p for p in (assets / "chat_templates/trl").glob("*.jinja") if not p.stem.startswith(("idefics", "llava"))]
    for path in paths:
        chat = load_template(str(path), tokenizer, {"now": "2026-01-31"})
        assert "Bye" in chat.render(CHAT[1:4], add_generation_prompt=True), path
        assert not chat.reads_clock
    assert len(paths) > 45
