"""transformers, live: it renders every template as we do, and reads the folders that we save as we encode."""

import datetime
import itertools
import json

import pytest
from chats import CONTENTS, CONTROL_TOKENS, all_chats, as_dicts, plain_chats
from tiny_tokenizers import write_byte_level, write_sentencepiece

from sft_jax.data.rendering import Renderer
from sft_jax.data.templates import BUILTIN_TEMPLATES, ChatTemplate, TemplateError, load_template
from sft_jax.data.tokenizer import load_tokenizer
from sft_jax.data.tokenizer_sample import SAMPLE
from sft_jax.datatypes import ConfigError, Message

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.parity

TODAY = "2026-01-31"


@pytest.fixture(autouse=True)
def the_clock_of_transformers(monkeypatch):
    class Clock(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return cls.fromisoformat(TODAY)

    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Clock)


def reasoning_names(text):
    """Names that the text mentions: what a user who has read it passes."""
    names = [name for name in ("reasoning_content", "thinking", "reasoning") if name in text]
    return names or ["reasoning_content"]


def assert_renders_alike(template, tokenizer):
    """Every conversation, with tools and without, as a prompt and whole; what one refuses, both refuse."""
    num_alike = 0
    names = reasoning_names(template.text)
    kwargs = {name: value for name, value in template.kwargs.items() if name != "now"}
    for messages, tools in all_chats():
        dicts = as_dicts(messages, template.tool_arguments, names)
        for prompt in (False, True):
            asked = {"chat_template": template.text, "tokenize": False, "add_generation_prompt": prompt}
            try:
                expected = tokenizer.apply_chat_template(dicts, tools=list(tools) or None, **asked, **kwargs)
            except Exception:  # Jinja's, or Python's from within an expression
                expected = None
            try:
                ours = template.render(messages, prompt, tools)
            except TemplateError:
                ours = None
            assert ours == expected
            num_alike += ours is not None
    template.close()
    return num_alike


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Name -> (our renderer, transformers' tokenizer of the folder that it saves)."""
    folder = tmp_path_factory.mktemp("parity")
    write_sentencepiece(folder / "sentencepiece")
    write_byte_level(folder / "byte_level")
    pairs = {}
    for name in BUILTIN_TEMPLATES:
        pairs[f"sentencepiece {name}"] = save(folder, folder / "sentencepiece", name, CONTROL_TOKENS.get(name, ()))
    pairs["byte_level chatml"] = save(folder, folder / "byte_level", "chatml", ())
    return pairs


def save(folder, source, template, new_tokens):
    tokenizer = load_tokenizer(source, new_tokens)
    renderer = Renderer(tokenizer, load_template(template, tokenizer, {}))
    out = folder / f"{source.name} {template}".replace("/", "_")
    out.mkdir()
    tokenizer.save(out, renderer.template.text)
    # Beside a model: its type must not make transformers choose a tokenizer class of its own.
    (out / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return renderer, transformers.AutoTokenizer.from_pretrained(out)


KINDS = [*(f"sentencepiece {name}" for name in BUILTIN_TEMPLATES), "byte_level chatml"]


@pytest.mark.parametrize("kind", KINDS)
def test_built_in_templates_render_alike(saved, kind):
    renderer, tokenizer = saved[kind]
    assert tokenizer.chat_template == renderer.template.text
    assert assert_renders_alike(renderer.template, tokenizer) >= 36


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("qwen3", {"enable_thinking": False}),
        ("qwen3", {"enable_thinking": True}),
        ("deepseek", {"thinking": True}),
        ("llama3.1", {"date_string": "1 May 2026"}),
        ("llama3.1", {"tools_in_user_message": False}),
    ],
)
def test_built_in_templates_with_variables_render_alike(saved, name, kwargs):
    """The exported text alone, headed by the defaults, says what our own variables say."""
    renderer, tokenizer = saved[f"sentencepiece {name}"]
    trained = load_template(name, renderer.tokenizer, kwargs)
    served = ChatTemplate("served", trained.text, renderer.tokenizer.special_tokens, {})
    assert assert_renders_alike(served, tokenizer) > 36
    for messages, tools in all_chats():
        try:
            expected = served.render(messages, True, tools)
        except TemplateError:
            continue
        assert trained.render(messages, True, tools) == expected
    served.close()


def test_kwargs_of_the_training_are_the_server_s_defaults(saved):
    _, tokenizer = saved["byte_level chatml"]
    text = "{% if think %}<think>{% endif %}\n{% for m in messages %}{{ m.content + effort }}{% endfor %}"
    trained = ChatTemplate("test", text, tokenizer.special_tokens_map, {"think": False, "effort": "lo\nw"})
    for messages in itertools.islice(plain_chats(), 5):
        asked = {"chat_template": trained.text, "tokenize": False}
        assert trained.render(messages, False) == tokenizer.apply_chat_template(as_dicts(messages), **asked)
        chosen = ChatTemplate("test", text, tokenizer.special_tokens_map, {"think": True, "effort": "lo\nw"})
        served = tokenizer.apply_chat_template(as_dicts(messages), **asked, think=True)
        assert chosen.render(messages, False) == served


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_folder_serves_the_prompts_that_were_trained(saved, kind):
    renderer, tokenizer = saved[kind]
    assert_serves(renderer, tokenizer)


def assert_serves(renderer, tokenizer):
    ours = renderer.tokenizer
    for text in (*SAMPLE, *CONTENTS):
        assert tokenizer(text, add_special_tokens=False).input_ids == ours.encode(text)
    for messages in plain_chats():
        try:
            expected = renderer.prompt_ids(messages)
        except TemplateError:
            continue  # no system message
        ids = tokenizer.apply_chat_template(as_dicts(messages), add_generation_prompt=True, return_dict=False)
        assert ids == expected
    for text, token_id in ours.control_tokens.items():
        assert tokenizer.convert_tokens_to_ids(text) == token_id
    assert len(tokenizer) == ours.vocab_size
    assert (tokenizer.bos_token or "", tokenizer.eos_token or "") == (ours.bos_token, ours.eos_token)
    start = [ours.token_id(ours.bos_token)] if ours.adds_bos else []
    assert tokenizer("Hi").input_ids == start + ours.encode("Hi")


@pytest.mark.parametrize(
    ("name", "template"),
    [
        ("tokenizers/llama2", "llama2"),
        ("tokenizers/llama2", "chatml"),
        ("tokenizers/mistral/mistral_instruct_tokenizer_241114.model.v7", "llama2"),
        ("tokenizers/minimind", ""),
        ("models/TinyStories-656K", "plain"),
    ],
)
def test_real_folders_serve_the_prompts_that_were_trained(assets, tmp_path, name, template):
    renderer, tokenizer = save(tmp_path, assets / name, template, CONTROL_TOKENS.get(template, ()))
    assert_serves(renderer, tokenizer)
    rows = (assets / "sft/gsm8k/test.jsonl").read_text().splitlines()[:200]
    for text in (text for row in rows for text in json.loads(row).values()):
        assert tokenizer(text, add_special_tokens=False).input_ids == renderer.tokenizer.encode(text)
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False
        )
        assert ids == renderer.prompt_ids([Message("user", text)])


def all_templates(assets):
    """Name and text. The files of chujiezheng are indented for reading and loaded so by their repository."""
    for path in sorted((assets / "chat_templates").glob("*/*.jinja")):
        text = path.read_text()
        is_indented = path.parent.name == "chujiezheng"
        yield path.stem, text.replace("    ", "").replace("\n", "") if is_indented else text
    for name in ("deepseek", "minimind"):
        config = json.loads((assets / f"tokenizers/{name}/tokenizer_config.json").read_text())
        yield f"tokenizers/{name}", config["chat_template"]


def test_real_templates_render_alike(assets, tmp_path):
    _, tokenizer = save(tmp_path, assets / "tokenizers/minimind", "chatml", ())
    num_alike = {}
    for name, text in all_templates(assets):
        template = ChatTemplate(name, text, tokenizer.special_tokens_map, {"now": TODAY})
        num_alike[name] = assert_renders_alike(template, tokenizer)
    assert len(num_alike) > 70
    assert min(num_alike.values()) > 0
    assert sum(num_alike.values()) > 10_000


def test_both_refuse_to_compile_what_is_no_template(saved):
    _, tokenizer = saved["byte_level chatml"]
    for text in ("{% if %}", "{{ 1 | nothing }}", "{% generation %}"):
        with pytest.raises(Exception, match=r"."):
            tokenizer.apply_chat_template(as_dicts([Message("user", "x")]), chat_template=text, tokenize=False)
        with pytest.raises(ConfigError, match="line 1: "):
            ChatTemplate("test", text, {}, {})
