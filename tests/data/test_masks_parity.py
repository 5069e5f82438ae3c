"""Where a template marks what is generated (`{% generation %}`), transformers' mask and ours are the same.

With two differences, which are meant: some templates count the newline, or an EOS, after the stop token as generated,
and gpt-oss's the header that the generation prompt feeds. No server asks the model for either, and we train neither.
"""

import ast
import itertools
import json
import re
from datetime import date

import numpy as np
import pytest
from template_survey import CALL, FUNCTION, ORIGIN

from sft_jax.data.rendering import Renderer
from sft_jax.data.templates import ChatTemplate, TemplateError
from sft_jax.data.tokenizer import load_tokenizer
from sft_jax.datatypes import ConfigError, Conversation, DataError, Message

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.parity

TOOLS = ({"type": "function", "function": FUNCTION},)


def conversations():
    for first, second in itertools.product(("Paris.", "two\n\nlines of 12 words"), repeat=2):
        turns = (Message("user", "Where?"), Message("assistant", first), Message("user", "Sure?"))
        yield Conversation((*turns, Message("assistant", second)), ORIGIN)
        yield Conversation((Message("system", "Be brief."), *turns, Message("assistant", second)), ORIGIN)
        yield Conversation((turns[0], Message("assistant", first, reasoning="I know.")), ORIGIN)
    result = Message("tool", "Sunny.", tool_call_id=CALL.id, name=CALL.name)
    calling = (Message("user", "Weather?"), Message("assistant", "", tool_calls=(CALL,)), result)
    yield Conversation((*calling, Message("assistant", "Sunny.")), ORIGIN, TOOLS)


def open_renderer(folder, path, kwargs):
    new_tokens = ("<|call|>", "<|observation|>", "<|user|>", "<turn|>", "<|turn>")
    while True:
        tokenizer = load_tokenizer(folder, new_tokens)
        try:
            template = ChatTemplate(path.stem, path.read_text(), tokenizer.special_tokens | {"bos_token": ""}, kwargs)
            return Renderer(tokenizer, template)
        except ConfigError as error:
            added = re.findall(r"new_tokens, as (\(.*\)), or choose", str(error))
            if not added:
                raise
            new_tokens += tuple(token for token in ast.literal_eval(added[0]) if token not in new_tokens)


def test_generation_blocks_are_what_is_trained(assets, tiny_byte_level, tmp_path):
    compared = {}
    for path in sorted((assets / "chat_templates/trl").glob("*_training.jinja")):
        kwargs = {"now": date.today().isoformat()} | (
            {"enable_thinking": True} if "enable_thinking" in path.read_text() else {}
        )
        try:
            renderer = open_renderer(tiny_byte_level, path, kwargs)
        except ConfigError:
            continue  # refused, for a reason in docs/templates.md
        folder = tmp_path / path.stem
        folder.mkdir()
        renderer.tokenizer.save(folder, renderer.template.text)
        (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
        theirs = transformers.AutoTokenizer.from_pretrained(folder)
        for conversation in conversations():
            try:
                examples = renderer.render(conversation)
            except (DataError, TemplateError):
                continue
            if len(examples) == 1:
                assert_same_mask(renderer, theirs, conversation, examples[0], path.stem)
                compared[path.stem] = compared.get(path.stem, 0) + 1
    assert len(compared) >= 12, compared
    assert sum(compared.values()) >= 80, compared


def assert_same_mask(renderer, theirs, conversation, example, name):
    messages = [renderer.template._as_dict(message) for message in conversation.messages]
    rendered = theirs.apply_chat_template(
        messages,
        tools=list(conversation.tools) or None,
        chat_template=renderer.template.text,
        return_assistant_tokens_mask=True,
        return_dict=True,
        bos_token="",
    )
    assert rendered["input_ids"] == example.ids.tolist(), name
    mask = np.array(rendered["assistant_masks"], bool)
    ours = np.concatenate([[0.0], example.loss_weights]) > 0
    assert not (ours & ~mask).any(), name
    eos = renderer.tokenizer.eos_token
    starts = np.flatnonzero(np.diff(mask & ~ours)) + 1
    for run in np.split(np.arange(len(mask)), starts):
        if mask[run[0]] and not ours[run[0]]:
            text = renderer.tokenizer.decode(example.ids[run].tolist(), continuation=True)
            after_stop = not text.replace(eos, "").strip() and example.ids[run[0] - 1] in renderer.stop_ids
            fed = run[-1] + 1 < len(ours) and ours[run[-1] + 1] and prompt_of(renderer, conversation).endswith(text)
            assert after_stop or fed, (name, text)


def prompt_of(renderer, conversation):
    first = next(i for i, message in enumerate(conversation.messages) if message.role == "assistant")
    return renderer.template.render(conversation.messages[:first], True, conversation.tools)
