"""transformers, live: it renders our templates as we do, and reads the folders that we save as we encode."""

import itertools
import json

import pytest
from tiny_tokenizers import write_byte_level, write_sentencepiece

from sft_jax.data.rendering import Renderer
from sft_jax.data.templates import BUILTIN_TEMPLATES, ChatTemplate, TemplateError, load_template
from sft_jax.data.tokenizer import load_tokenizer
from sft_jax.data.tokenizer_sample import SAMPLE
from sft_jax.datatypes import Message

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.parity

CONTENTS = ("Hi", " padded \n", "two\n\nlines", "  <b>é</b> {{ x }} 日本", "1 + 1 = 2")
NEW_TOKENS = {
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "llama3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
}


def conversations():
    for first, second, system in itertools.product(CONTENTS, CONTENTS, (None, *CONTENTS)):
        head = [] if system is None else [Message("system", system)]
        turns = [first, second, "And then?", "Nothing."]
        roles = itertools.cycle(["user", "assistant"])
        messages = [*head, *(Message(role, content) for role, content in zip(roles, turns, strict=False))]
        yield messages
        yield messages[:-1]


def as_dicts(messages):
    return [{"role": message.role, "content": message.content} for message in messages]


def assert_renders_alike(template, tokenizer):
    for messages in conversations():
        for prompt in (False, True):
            asked = {"chat_template": template.text, "tokenize": False, "add_generation_prompt": prompt}
            expected = tokenizer.apply_chat_template(as_dicts(messages), **asked, **template.kwargs)
            assert template.render(messages, add_generation_prompt=prompt) == expected


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Name -> (our renderer, transformers' tokenizer of the folder that it saves)."""
    folder = tmp_path_factory.mktemp("parity")
    write_sentencepiece(folder / "sentencepiece")
    write_byte_level(folder / "byte_level")
    pairs = {}
    for name in BUILTIN_TEMPLATES:
        pairs[f"sentencepiece {name}"] = save(folder, folder / "sentencepiece", name, NEW_TOKENS.get(name, ()))
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
    assert_renders_alike(renderer.template, tokenizer)


def test_kwargs_of_the_training_are_the_server_s_defaults(saved):
    _, tokenizer = saved["byte_level chatml"]
    text = "{% if think %}<think>{% endif %}\n{% for m in messages %}{{ m.content + effort }}{% endfor %}"
    trained = ChatTemplate("test", text, tokenizer.special_tokens_map, {"think": False, "effort": "lo\nw"})
    for messages in itertools.islice(conversations(), 5):
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
    for messages in conversations():
        ids = tokenizer.apply_chat_template(as_dicts(messages), add_generation_prompt=True, return_dict=False)
        assert ids == renderer.prompt_ids(messages)
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
    renderer, tokenizer = save(tmp_path, assets / name, template, NEW_TOKENS.get(template, ()))
    assert_serves(renderer, tokenizer)
    rows = (assets / "sft/gsm8k/test.jsonl").read_text().splitlines()[:200]
    for text in (text for row in rows for text in json.loads(row).values()):
        assert tokenizer(text, add_special_tokens=False).input_ids == renderer.tokenizer.encode(text)
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False
        )
        assert ids == renderer.prompt_ids([Message("user", text)])


def test_real_templates_render_alike(assets, tmp_path):
    _, tokenizer = save(tmp_path, assets / "tokenizers/minimind", "chatml", ())
    variables = tokenizer.special_tokens_map
    compared = 0
    for path in sorted((assets / "chat_templates").glob("*/*.jinja")):
        text = path.read_text()
        if "strftime_now" in text:
            continue  # the clock: both would write today's date
        template = ChatTemplate(path.stem, text, variables, {})
        try:
            template.render([Message("user", "Hi"), Message("assistant", "Hello"), Message("user", "Bye")], True)
        except TemplateError:
            continue
        for messages in itertools.islice(conversations(), 0, None, 7):
            for prompt in (False, True):
                asked = {"chat_template": text, "tokenize": False, "add_generation_prompt": prompt}
                try:
                    ours = template.render(messages, add_generation_prompt=prompt)
                except TemplateError:
                    with pytest.raises(Exception, match=r"."):  # refused by both
                        tokenizer.apply_chat_template(as_dicts(messages), **asked)
                    continue
                assert ours == tokenizer.apply_chat_template(as_dicts(messages), **asked), path
                compared += 1
    assert compared > 500
