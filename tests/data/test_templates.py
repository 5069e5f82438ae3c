"""Templates render as written down for each format, and as the originals; every refusal says what to do."""

import datetime
import itertools
import json
import re
import shutil

import pytest
from chats import CALL, CONTROL_TOKENS, TOOLS, all_chats, plain_chats, tool_chats

from sft_jax.data.templates import BUILTIN_TEMPLATES, ChatTemplate, TemplateError, load_template
from sft_jax.data.tokenizer import load_tokenizer
from sft_jax.datatypes import ConfigError, Message, ToolCall

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
    "llama3.1": (
        "<s><|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n"
        "Today Date: 26 Jul 2024\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nHello!<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nBye<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nSee you.<|eot_id|>"
    ),
    "qwen2.5": (
        "<|im_start|>system\n Be brief. <|im_end|>\n<|im_start|>user\n Hi\n<|im_end|>\n"
        "<|im_start|>assistant\nHello! <|im_end|>\n<|im_start|>user\nBye<|im_end|>\n"
        "<|im_start|>assistant\n  See you.<|im_end|>\n"
    ),
    "qwen3": (
        "<|im_start|>system\n Be brief. <|im_end|>\n<|im_start|>user\n Hi\n<|im_end|>\n"
        "<|im_start|>assistant\nHello! <|im_end|>\n<|im_start|>user\nBye<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n\n  See you.<|im_end|>\n"
    ),
    "gemma3": (
        "<s><start_of_turn>user\n Be brief. \n\nHi<end_of_turn>\n<start_of_turn>model\nHello!<end_of_turn>\n"
        "<start_of_turn>user\nBye<end_of_turn>\n<start_of_turn>model\nSee you.<end_of_turn>\n"
    ),
    # mistralai/mistral-common, InstructTokenizerV1: the system prompt and a blank line head the first instruction.
    "mistral-v1": "<s>[INST] Be brief. \n\n Hi [/INST] Hello!</s>[INST] Bye [/INST] See you.</s>",
    # mistralai/mistral-common, tests/data/chat_templates/v3_spm.jinja and v7_spm.jinja.
    "mistral-v3": "<s>[INST]  Hi\n[/INST] Hello! </s>[INST]  Be brief. \n\nBye[/INST]   See you.</s>",
    "mistral-v7": (
        "<s>[SYSTEM_PROMPT]  Be brief. [/SYSTEM_PROMPT][INST]  Hi\n[/INST] Hello! </s>[INST] Bye[/INST]   See you.</s>"
    ),
    "zephyr": (
        "<|system|>\nBe brief.</s>\n<|user|>\nHi</s>\n<|assistant|>\nHello!</s>\n<|user|>\nBye</s>\n"
        "<|assistant|>\nSee you.</s>\n"
    ),
    "phi3": (
        "<|system|>\n Be brief. <|end|>\n<|user|>\n Hi\n<|end|>\n<|assistant|>\nHello! <|end|>\n<|user|>\nBye<|end|>\n"
        "<|assistant|>\n  See you.<|end|>\n</s>"
    ),
    # microsoft/phi-4, tokenizer_config.json: no newlines at all.
    "phi4": (
        "<|im_start|>system<|im_sep|> Be brief. <|im_end|><|im_start|>user<|im_sep|> Hi\n<|im_end|>"
        "<|im_start|>assistant<|im_sep|>Hello! <|im_end|><|im_start|>user<|im_sep|>Bye<|im_end|>"
        "<|im_start|>assistant<|im_sep|>  See you.<|im_end|>"
    ),
    # allenai/OLMo-2-1124-7B-SFT, tokenizer_config.json: a newline after each turn but the last.
    "olmo2": (
        "<s><|system|>\n Be brief. \n<|user|>\n Hi\n\n<|assistant|>\nHello! </s>\n<|user|>\nBye\n"
        "<|assistant|>\n  See you.</s>"
    ),
    "granite": (
        "<|start_of_role|>system<|end_of_role|> Be brief. <|end_of_text|>\n"
        "<|start_of_role|>user<|end_of_role|> Hi\n<|end_of_text|>\n"
        "<|start_of_role|>assistant<|end_of_role|>Hello! <|end_of_text|>\n"
        "<|start_of_role|>user<|end_of_role|>Bye<|end_of_text|>\n"
        "<|start_of_role|>assistant<|end_of_role|>  See you.<|end_of_text|>\n"
    ),
    "deepseek": (
        "<s> Be brief. <｜User｜> Hi\n<｜Assistant｜>Hello! <｜end▁of▁sentence｜>"
        "<｜User｜>Bye<｜Assistant｜>  See you.<｜end▁of▁sentence｜>"
    ),
    "plain": "<s> Be brief.  Hi\nHello! </s>Bye  See you.</s>",
}
# Without a system message, where there is more to it than leaving it out.
WITHOUT_SYSTEM = {
    "gemma": (
        "<s><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\nHello!<end_of_turn>\n"
        "<start_of_turn>user\nBye<end_of_turn>\n<start_of_turn>model\nSee you.<end_of_turn>\n"
    ),
    "qwen2.5": EXPECTED["qwen2.5"].replace(
        " Be brief. ", "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
    ),
    "llama3.1": EXPECTED["llama3.1"].replace("Be brief.", ""),
    "mistral-v3": "<s>[INST]  Hi\n[/INST] Hello! </s>[INST] Bye[/INST]   See you.</s>",
}
STOPS = {
    **dict.fromkeys(("llama2", "mistral-v1", "mistral-v3", "mistral-v7", "zephyr", "olmo2", "plain"), "</s>"),
    **dict.fromkeys(("chatml", "qwen2.5", "qwen3", "phi4"), "<|im_end|>"),
    **dict.fromkeys(("llama3", "llama3.1"), "<|eot_id|>"),
    **dict.fromkeys(("gemma", "gemma3"), "<end_of_turn>"),
    **{"phi3": "<|end|>", "granite": "<|end_of_text|>", "deepseek": "<｜end▁of▁sentence｜>"},
}


@pytest.fixture(scope="module")
def tokenizer(tiny_sentencepiece):
    return load_tokenizer(tiny_sentencepiece)


def template(text, **kwargs):
    return ChatTemplate("test.jinja", text, {"bos_token": "<s>", "eos_token": "</s>"}, kwargs)


def render_or_none(chat_template, messages, add_generation_prompt, tools=()):
    try:
        return chat_template.render(messages, add_generation_prompt, tools)
    except TemplateError:
        return None


# --- The built-in formats --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BUILTIN_TEMPLATES)
def test_built_in_formats(tokenizer, name):
    built_in = load_template(name, tokenizer, {})
    if name == "gemma":
        with pytest.raises(TemplateError, match="no system message"):
            built_in.render(CHAT, add_generation_prompt=False)
    else:
        assert built_in.render(CHAT, add_generation_prompt=False).replace(tokenizer.eos_token, "</s>") == EXPECTED[name]
    if name in WITHOUT_SYSTEM:
        assert built_in.render(CHAT[1:], add_generation_prompt=False) == WITHOUT_SYSTEM[name]


SWITCHES = {"qwen3": "enable_thinking", "deepseek": "thinking"}
FORMS = [
    *((name, {}) for name in BUILTIN_TEMPLATES),
    *((name, {switch: on}) for name, switch in SWITCHES.items() for on in (True, False)),
]


def has_question(messages):
    return any(message.role == "user" for message in messages)


@pytest.mark.parametrize(("name", "kwargs"), FORMS)
def test_built_in_prompts_are_prefixes_of_turns_that_stop(tokenizer, name, kwargs):
    built_in = load_template(name, tokenizer, kwargs)
    num_turns = 0
    for messages, tools in all_chats():
        for i, message in enumerate(messages):
            if message.role != "assistant":
                continue
            prompt = render_or_none(built_in, messages[:i], True, tools) if i else None
            whole = render_or_none(built_in, messages[: i + 1], False, tools)
            if prompt is None or whole is None:
                continue
            if kwargs.get("enable_thinking") is False and (message.reasoning or not has_question(messages[:i])):
                continue  # the prompt says that there is no reasoning, and without a question the turn does not
            assert whole.startswith(prompt)
            before, stop, after = whole.removeprefix(prompt).partition(STOPS[name])
            assert stop
            assert message.content.strip() in before or (name == "llama3.1" and message.tool_calls)
            assert after.strip() == ("</s>" if name == "phi3" else "")
            num_turns += 1
    assert num_turns > 20


@pytest.mark.parametrize("name", BUILTIN_TEMPLATES)
def test_built_in_templates_write_only_the_control_tokens_listed(tokenizer, name):
    """So that other tests give tiny tokenizers what they need."""
    built_in = load_template(name, tokenizer, {})
    written = set()
    for messages, tools in all_chats():
        text = render_or_none(built_in, messages, True, tools) or ""
        written |= set(re.findall(r"<\|\w+\|>|<｜[^｜]+｜>|<\w+_of_turn>|\[/?[A-Z]+_[A-Z]+\]", text))
        if "[INST] " in text and name not in ("llama2", "mistral-v1"):
            written |= {"[INST]", "[/INST]"}
    written.discard("<|tool|>")  # zephyr takes any role in the assistant's place, as the original
    assert written == set(CONTROL_TOKENS.get(name, ()))


def original(assets, path):
    """Jinja text of an asset. The files of chujiezheng are indented for reading and loaded so by their repository."""
    if path == "deepseek":
        return json.loads((assets / "tokenizers/deepseek/tokenizer_config.json").read_text())["chat_template"]
    text = (assets / f"chat_templates/{path}.jinja").read_text()
    return text.replace("    ", "").replace("\n", "") if path.startswith("chujiezheng") else text


def without_calls(messages):
    return all(message.role != "tool" and not message.tool_calls for message in messages)


def user_after_result(messages):
    return ("tool", "user") in itertools.pairwise(message.role for message in messages)


ORIGINALS = {
    "llama3": ("trl/llama3", lambda m: True),
    "llama3.1": ("trl/llama3_1", lambda m: True),
    "qwen2.5": ("trl/qwen2_5", lambda m: True),
    "qwen3": ("trl/qwen3", lambda m: True),
    "gemma": ("trl/gemma", lambda m: True),
    "gemma3": ("trl/gemma3", lambda m: True),
    "phi3": ("trl/phi3", lambda m: True),
    "zephyr": ("chujiezheng/zephyr", lambda m: True),
    # It knows calls and results as roles of its own only.
    "granite": ("chujiezheng/granite-3.0-instruct", without_calls),
    # It puts the system message before [INST], where Mistral's own code has it after.
    "mistral-v1": ("chujiezheng/mistral-instruct", lambda m: m[0].role != "system" and without_calls(m)),
    # It trims the system message, as Meta's own code does not.
    "llama2": ("chujiezheng/llama-2-chat", lambda m: m[0].content == m[0].content.strip() and without_calls(m)),
    # It opens a list of calls, and of results, once in a conversation; and a user after a result leaves it open.
    "deepseek": ("deepseek", lambda m: sum(bool(x.tool_calls) for x in m) < 2 and not user_after_result(m)),
}


@pytest.mark.parametrize("name", ORIGINALS)
def test_built_in_templates_render_as_the_originals(assets, name):
    path, is_alike = ORIGINALS[name]
    variables = {"bos_token": "<s>", "eos_token": STOPS[name] if name == "deepseek" else "</s>"}
    theirs = ChatTemplate(path, original(assets, path), variables, {})
    ours = load_template(name, load_tokenizer(assets / "tokenizers/llama2"), {})
    assert ours.kwargs == {}
    num_alike = 0
    for messages, tools in [*((m, ()) for m in plain_chats()), *all_chats()]:
        if not is_alike(messages):
            continue
        for prompt in (False, True):
            expected = render_or_none(theirs, messages, prompt, tools)
            assert render_or_none(ours, messages, prompt, tools) == expected
            num_alike += expected is not None
    assert num_alike > 60
    theirs.close()


@pytest.mark.parametrize(("name", "path"), [("qwen3", "trl/qwen3"), ("llama3.1", "trl/llama3_1")])
def test_variables_of_the_originals(assets, name, path):
    for kwargs in (
        [dict(enable_thinking=True), dict(enable_thinking=False)]
        if name == "qwen3"
        else [dict(date_string="1 Jan 2026"), dict(tools_in_user_message=False)]
    ):
        variables = {"bos_token": "<s>", "eos_token": "</s>"}
        theirs = ChatTemplate(path, original(assets, path), variables, kwargs)
        ours = load_template(name, load_tokenizer(assets / "tokenizers/llama2"), kwargs)
        for messages, tools in all_chats():
            for prompt in (False, True):
                expected = render_or_none(theirs, messages, prompt, tools)
                assert render_or_none(ours, messages, prompt, tools) == expected
        theirs.close()


# --- Tools and reasoning, by hand where no original is at hand -------------------------------------------------------

WEATHER = Message("user", "Weather?")
CALLING = Message("assistant", "", tool_calls=(ToolCall("get", {"city": "Rom"}, '{"city":"Rom"}', id="call00001"),))
TWO_CALLS = Message("assistant", "", tool_calls=(*CALLING.tool_calls, ToolCall("now", {}, "{}", id="call00002")))
RESULT = Message("tool", '{"c": 22}', tool_call_id="call00001", name="get")
NUMBER = Message("tool", "22", tool_call_id="call00002", name="now")
ANSWER = Message("assistant", "Warm.")
SCHEMA = {"type": "function", "function": {"name": "get", "parameters": {}}}
SCHEMA_JSON = '{"type": "function", "function": {"name": "get", "parameters": {}}}'


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        # mistralai/mistral-common, tests/data/chat_templates/v3_spm.jinja: numbers in results are written as numbers.
        (
            "mistral-v3",
            "<s>[AVAILABLE_TOOLS] [" + SCHEMA_JSON + "][/AVAILABLE_TOOLS][INST] Weather?[/INST]"
            '[TOOL_CALLS] [{"name": "get", "arguments": {"city": "Rom"}, "id": "call00001"}, '
            '{"name": "now", "arguments": {}, "id": "call00002"}]</s>'
            '[TOOL_RESULTS] {"content": "{\\"c\\": 22}", "call_id": "call00001"}[/TOOL_RESULTS]'
            '[TOOL_RESULTS] {"content": 22, "call_id": "call00002"}[/TOOL_RESULTS] Warm.</s>',
        ),
        # The same, v7_spm.jinja.
        (
            "mistral-v7",
            "<s>[AVAILABLE_TOOLS] [" + SCHEMA_JSON + "][/AVAILABLE_TOOLS][INST] Weather?[/INST]"
            '[TOOL_CALLS] [{"name": "get", "arguments": {"city": "Rom"}, "id": "call00001"}, '
            '{"name": "now", "arguments": {}, "id": "call00002"}]</s>'
            '[TOOL_RESULTS] call00001[TOOL_CONTENT] {"c": 22}[/TOOL_RESULTS]'
            "[TOOL_RESULTS] call00002[TOOL_CONTENT] 22[/TOOL_RESULTS] Warm.</s>",
        ),
        # ibm-granite/granite-3.1-8b-instruct: "respond with <|tool_call|> followed by a JSON list of tools used".
        (
            "granite",
            '<|start_of_role|>available_tools<|end_of_role|>\n{\n    "type": "function",\n    "function": {\n'
            '        "name": "get",\n        "parameters": {}\n    }\n}<|end_of_text|>\n'
            "<|start_of_role|>user<|end_of_role|>Weather?<|end_of_text|>\n"
            '<|start_of_role|>assistant<|end_of_role|><|tool_call|>[{"name": "get", "arguments": {"city": "Rom"}}, '
            '{"name": "now", "arguments": {}}]<|end_of_text|>\n'
            '<|start_of_role|>tool_response<|end_of_role|>{"c": 22}<|end_of_text|>\n'
            "<|start_of_role|>tool_response<|end_of_role|>22<|end_of_text|>\n"
            "<|start_of_role|>assistant<|end_of_role|>Warm.<|end_of_text|>\n",
        ),
        (
            "deepseek",
            "<s><｜User｜>Weather?<｜Assistant｜><｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get\n"
            '```json\n{"city": "Rom"}\n```<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>now\n'
            "```json\n{}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜><｜end▁of▁sentence｜><｜tool▁outputs▁begin｜>"
            '<｜tool▁output▁begin｜>{"c": 22}<｜tool▁output▁end｜><｜tool▁output▁begin｜>22<｜tool▁output▁end｜>'
            "<｜tool▁outputs▁end｜>Warm.<｜end▁of▁sentence｜>",
        ),
    ],
)
def test_tools_by_hand(tokenizer, name, expected):
    built_in = load_template(name, tokenizer, {})
    assert built_in.render((WEATHER, TWO_CALLS, RESULT, NUMBER, ANSWER), False, (SCHEMA,)) == expected


@pytest.mark.parametrize(
    ("name", "messages", "words"),
    [
        ("mistral-v3", (WEATHER, WEATHER), "no user message after user"),
        ("mistral-v7", (WEATHER, RESULT), "no tool message after user"),
        ("mistral-v3", (ANSWER,), "no assistant message after start"),
        ("mistral-v7", (WEATHER, Message("assistant", "")), "no empty assistant message"),
        ("mistral-v3", (WEATHER, Message("assistant", "")), "no empty assistant message"),
        ("mistral-v3", (WEATHER, Message("assistant", "x", tool_calls=(CALL,))), "both content and calls"),
        ("mistral-v3", (WEATHER, Message("assistant", "", tool_calls=(ToolCall("f", {}, "{}"),))), "9 characters"),
        ("mistral-v7", (WEATHER, CALLING, Message("tool", "x", tool_call_id="call_1")), "9 characters"),
        ("llama3.1", (WEATHER, TWO_CALLS), "one tool a turn"),
        ("gemma3", (WEATHER, WEATHER), "user and assistant in turn"),
        ("zephyr", (WEATHER, WEATHER), "user and assistant in turn"),
    ],
)
def test_what_built_in_templates_refuse(tokenizer, name, messages, words):
    with pytest.raises(TemplateError, match=words):
        load_template(name, tokenizer, {}).render(messages, add_generation_prompt=False)


def test_deepseek_with_reasoning(tokenizer):
    thought = Message("assistant", "4.", reasoning="2 + 2")
    thinks = load_template("deepseek", tokenizer, {"thinking": True})
    prompt = thinks.render((WEATHER, thought, WEATHER), add_generation_prompt=True)
    assert prompt == (
        "<s><｜User｜>Weather?<｜Assistant｜>4.<｜end▁of▁sentence｜><｜User｜>Weather?<｜Assistant｜><think>\n"
    )
    whole = thinks.render((WEATHER, thought, WEATHER, thought), add_generation_prompt=False)
    assert whole == prompt + "2 + 2\n</think>\n\n4.<｜end▁of▁sentence｜>"
    without = load_template("deepseek", tokenizer, {})
    assert without.render((WEATHER, thought), False) == ("<s><｜User｜>Weather?<｜Assistant｜>4.<｜end▁of▁sentence｜>")


def test_plain_writes_bos_only_where_documents_have_one(tiny_byte_level, tokenizer):
    assert "bos_token" in load_template("plain", tokenizer, {}).text
    assert "bos_token" not in load_template("plain", load_tokenizer(tiny_byte_level), {}).text


@pytest.mark.parametrize("roles", ["assistant", "user user", "system assistant", "user assistant tool"])
def test_llama2_refuses_other_orders(tokenizer, roles):
    messages = [Message(role, "x") for role in roles.split()]
    with pytest.raises(TemplateError, match="user and assistant in turn"):
        load_template("llama2", tokenizer, {}).render(messages, add_generation_prompt=True)


# --- What a template is given ----------------------------------------------------------------------------------------


def shown(text, *messages, tools=()):
    """The messages as a template sees them that has `text` in it."""
    chat_template = template("{{ messages | tojson }}{# " + text + " #}{% set _ = " + (text or "1") + " %}")
    return json.loads(chat_template.render(messages, False, tools))


def test_messages_have_only_what_the_row_has():
    assert shown("", WEATHER, ANSWER) == [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": "Warm."},
    ]
    assert shown("", CALLING, RESULT) == [
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [
                {"id": "call00001", "type": "function", "function": {"name": "get", "arguments": {"city": "Rom"}}}
            ],
        },
        {"role": "tool", "content": '{"c": 22}', "tool_call_id": "call00001", "name": "get"},
    ]
    (bare,) = shown("", Message("assistant", "x", tool_calls=(ToolCall("f", {}, "{}"),)))
    assert bare["tool_calls"] == [{"type": "function", "function": {"name": "f", "arguments": {}}}]


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("", ["reasoning_content"]),
        ("messages[0].thinking", ["thinking"]),
        ("messages[0].reasoning", ["reasoning"]),
        ("messages[0]['reasoning_content'] or messages[0]['thinking']", ["reasoning_content", "thinking"]),
        ("enable_thinking and messages[0].reasoning_content", ["reasoning_content"]),
    ],
)
def test_reasoning_goes_by_the_names_that_the_template_reads(text, names):
    (message,) = shown(text, Message("assistant", "4.", reasoning="2 + 2"))
    assert message == {"role": "assistant", "content": "4.", **dict.fromkeys(names, "2 + 2")}


def test_tools_are_given_as_they_are():
    text = "{{ tools is none }} {{ tools | tojson }}"
    assert template(text).render([], False) == "True null"
    assert template(text).render([], False, TOOLS) == f"False {json.dumps(list(TOOLS), ensure_ascii=False)}"


CALLS = "{% for m in messages %}{% for c in m.tool_calls %}{{ c.function.name }}<>{% endfor %}{% endfor %}"


@pytest.mark.parametrize(
    ("writes", "form", "expected"),
    [
        ("{{ c.function.arguments | tojson }}", "object", '{"city": "Rom"}'),
        ("{% for k, v in c.function.arguments | items %}{{ k }}={{ v }}{% endfor %}", "object", "city=Rom"),
        ("{{ '' + c.function.arguments }}", "string", '{"city":"Rom"}'),
        ("{{ c.function.arguments }}", "string", '{"city":"Rom"}'),
        ("{% if c.function.arguments is string %}{{ c.function.arguments }}{% endif %}", "string", '{"city":"Rom"}'),
        ("", "", ""),
        ("{{ raise_exception('no calls') }}", "", None),
    ],
)
def test_the_form_of_arguments_is_found(writes, form, expected):
    chat_template = template(CALLS.replace("<>", writes))
    assert chat_template.tool_arguments == form
    if expected is not None:
        assert chat_template.render([CALLING], False) == f"get{expected}"


def test_several_requests_are_the_single_ones(tokenizer):
    for chat_template in (
        load_template("qwen3", tokenizer, {}),
        template("{{ messages | tojson }}{{ tools | tojson }}"),
    ):
        for messages, tools in tool_chats():
            requests = [(range(i), prompt) for i in range(1, len(messages)) for prompt in (True, False)]
            singly = [chat_template.render(messages[: len(own)], prompt, tools) for own, prompt in requests]
            assert chat_template.render_each(messages, requests, tools) == singly


def test_variables_read(tokenizer):
    assert load_template("qwen3", tokenizer, {}).variables_read >= {"enable_thinking"}
    assert "thinking" in load_template("deepseek", tokenizer, {"thinking": True}).variables_read
    assert load_template("chatml", tokenizer, {}).variables_read == set()
    text = "{{ bos_token }}{{ a }}{% set b = 1 %}{{ b }}{% for m in messages %}{{ m.c + d }}{% endfor %}"
    assert template(text + "{{ strftime_now('%Y') }}{{ range(2) }}{{ tools }}", e=1).variables_read == {"a", "d"}


def test_with_kwargs_renders_the_same_template_otherwise():
    base = template("{{ a }}{{ b }}{{ strftime_now('%d') }}", a=1)
    other = base.with_kwargs({"b": 2, "now": "2026-01-31"})
    assert other.render([], False) == "1231"
    assert other.kwargs == {"a": 1, "b": 2, "now": "2026-01-31"}
    assert not other.reads_clock
    assert base.render([], False).startswith("1")
    assert base.reads_clock
    assert other.text == template("{{ a }}{{ b }}{{ strftime_now('%d') }}", a=1, b=2).text


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
    path.write_bytes(b"caf\xe9")
    with pytest.raises(ConfigError, match=r"^config\.data\.chat_template: .*mine\.jinja is not UTF-8"):
        load_template(str(path), tokenizer, {})
    with pytest.raises(ConfigError, match=r"^config\.data\.chat_template: /proc/self/mem cannot be read: "):
        load_template("/proc/self/mem", tokenizer, {})
    path.write_text("one\ntwo {{ messages | nothing }}")
    with pytest.raises(ConfigError, match=r"mine\.jinja, line 2: No filter named 'nothing'"):
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
    values = {"a": False, "b": None, "c": 'q"\\\n{{é🎉}}', "d": [1, -2.5, None], "e": {"k": True}, "f": "True"}
    text = "  {% macro show() %}{{ [a, b, c, d, e, f] }}{% endmacro %}{{ show() }}{{ [a, b, c, d, e, f] }}\n\nend\n"
    trained = template(text, **values)
    served = template(trained.text)
    assert served.render([], False) == trained.render([], False) == template(text, **values).render([], False)
    assert repr(list(values.values())) in trained.render([], False)
    assert trained.text.endswith(text)
    assert template(trained.text, a=7).render([], False).count("[7, None") == 2  # the server may still choose
    assert template(text).text == text
    for value, shown in (({1}, r"\{1\}"), (float("inf"), "inf")):
        with pytest.raises(ConfigError, match=rf"chat_template_kwargs\.x: is {shown}; expected what JSON can hold"):
            template(text, x=value)


def test_documents_are_none():
    assert template("{{ documents is none }}").render([], False) == "True"


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
        ("{{ dict(a=1) | tojson }}{{ dict.fromkeys('ab', 0) }}", "{\"a\": 1}{'a': 0, 'b': 0}"),
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
        "{{ dict.update(messages[0], role='x') }}",
        "{% set ns = namespace(_a=1) %}",
        "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
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
        dated = {"now": "2026-01-31"} if "strftime_now" in path.read_text() else {}
        chat = load_template(str(path), tokenizer, dated)
        assert "Bye" in chat.render(CHAT[1:4], add_generation_prompt=True), path
        assert not chat.reads_clock
    assert len(paths) > 45


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("enable_thinkin", r"chat template qwen3 does not read it. Did you mean enable_thinking\?"),
        ("colour", "does not read it. Take it out"),
        ("now", "does not read it. Take it out"),  # it asks for no date
        ("x y", "'x y' is no name of a variable"),
        ("a %}{{ 1/0 }}{%", "is no name of a variable"),
    ],
)
def test_variables_that_do_nothing_are_refused(tiny_byte_level, name, message):
    with pytest.raises(ConfigError, match=message):
        load_template("qwen3", load_tokenizer(tiny_byte_level), {name: "2026-01-31"})
