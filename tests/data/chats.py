"""Conversations for tests of templates: systems, several turns, tools, calls, results and reasoning."""

import itertools

from sft_jax.datatypes import Message, ToolCall

CONTENTS = ("Hi", " padded \n", "two\n\nlines", "  <b>é</b> {{ x }} 日本", "1 + 1 = 2")

TOOLS = (
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "The weather, here or there.",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "description": 'e.g. "Zürich"'},
                    "days": {"type": "integer", "default": None},
                },
                "required": ["city"],
            },
        },
    },
    {
        "type": "function",
        "function": {"name": "now", "description": "<time>", "parameters": {"type": "object", "properties": {}}},
    },
)

CALL = ToolCall(
    "get_weather", {"city": "Zürich", "days": 2, "deep": {"a": [1.5, True, None]}},
    '{"city": "Zürich", "days": 2, "deep": {"a": [1.5, true, null]}}', id="call00001",
)  # fmt: skip
OTHER_CALL = ToolCall("now", {}, "{}", id="call00002")

_SYSTEM = Message("system", "Be brief. ")
_USER = Message("user", "How is the weather?")
_CALLING = Message("assistant", "", tool_calls=(CALL,))
_RESULT = Message("tool", '{"celsius": 22}', tool_call_id=CALL.id, name=CALL.name)
_ANSWER = Message("assistant", "It is 22 °C.")
_THANKS = Message("user", "Thanks!")
_WELCOME = Message("assistant", "You are welcome.")


def plain_chats():
    """Contents of many kinds, with a system message and without, ending with a question or an answer."""
    for first, second, system in itertools.product(CONTENTS, CONTENTS, (None, *CONTENTS)):
        head = [] if system is None else [Message("system", system)]
        turns = [first, second, "And then?", "Nothing."]
        roles = itertools.cycle(["user", "assistant"])
        messages = (*head, *(Message(role, content) for role, content in zip(roles, turns, strict=False)))
        yield messages
        yield messages[:-1]


def reasoning_chats():
    thought, again = "First I think.\n\nThen <b> & é.", " short "
    for head in ((), (_SYSTEM,)):
        first, second = _ANSWER._replace(reasoning=thought), _WELCOME._replace(reasoning=again)
        chat = (*head, _USER, first, _THANKS, second)
        yield from (chat, chat[:-1], chat[:-2], (*head, _USER, first, _THANKS, _WELCOME))
        calling = _CALLING._replace(reasoning=thought)
        yield from ((*head, _USER, calling, _RESULT, second), (*head, _USER, calling, _RESULT, _ANSWER, _THANKS))


def tool_chats():
    """Pairs of messages and tools."""
    both = _CALLING._replace(tool_calls=(CALL, OTHER_CALL))
    other_result = Message("tool", "noon", tool_call_id=OTHER_CALL.id, name=OTHER_CALL.name)
    for head in ((), (_SYSTEM,)):
        once = (*head, _USER, _CALLING, _RESULT, _ANSWER)
        chats = [
            once[: len(head) + 1], once[:-2], once[:-1], once,
            (*once, _THANKS), (*once, _THANKS, _WELCOME), (*once, *once[len(head) :]),
            (*head, _USER, _CALLING._replace(content="Let me see."), _RESULT, _ANSWER),
            (*head, _USER, both, _RESULT, other_result, _ANSWER),
            (*head, _USER, _CALLING, _RESULT._replace(content="22"), _CALLING,
             _RESULT._replace(content="1.5"), _ANSWER),
            (*head, _USER, _CALLING, _RESULT, _THANKS, _WELCOME),
        ]  # fmt: skip
        for chat in chats:
            yield chat, TOOLS
            yield chat, ()
    yield (_USER, _ANSWER), TOOLS
    yield (_USER, _ANSWER), TOOLS[:1]


def odd_chats():
    """Orders that many templates refuse."""
    yield from ((_ANSWER,), (_USER, _USER), (_SYSTEM, _ANSWER, _USER), (_USER, _SYSTEM, _ANSWER), (_USER, _RESULT))
    yield (_USER, _CALLING._replace(tool_calls=(CALL._replace(id=""),)), _RESULT._replace(tool_call_id=""), _ANSWER)


def all_chats():
    """Pairs of messages and tools: every kind, the plain ones thinned out."""
    for messages in itertools.chain(itertools.islice(plain_chats(), 0, None, 7), reasoning_chats(), odd_chats()):
        yield messages, ()
    yield from tool_chats()


def as_dicts(messages, arguments="object", reasoning=("reasoning_content",)):
    """Messages as users of transformers write them; `arguments` of calls as an object or a string."""
    return [_as_dict(message, arguments, reasoning) for message in messages]


def _as_dict(message, arguments, reasoning):
    shown = {"role": message.role, "content": message.content}
    if message.reasoning:
        shown |= dict.fromkeys(reasoning, message.reasoning)
    if message.tool_calls:
        shown["tool_calls"] = [
            ({"id": call.id} if call.id else {})
            | {
                "type": "function",
                "function": {
                    "name": call.name,
                    "arguments": call.arguments_json if arguments == "string" else call.arguments,
                },
            }
            for call in message.tool_calls
        ]
    if message.tool_call_id:
        shown["tool_call_id"] = message.tool_call_id
    if message.name:
        shown["name"] = message.name
    return shown


_CHATML = ("<|im_start|>", "<|im_end|>")
_LLAMA3 = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
_GEMMA = ("<start_of_turn>", "<end_of_turn>")
_MISTRAL_V3 = (
    *("[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"),
    *("[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"),
)
_DEEPSEEK = ("<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>")
_DEEPSEEK_TOOLS = [
    f"<｜tool▁{kind}▁{end}｜>" for kind in ("calls", "call", "outputs", "output") for end in ("begin", "end")
]

CONTROL_TOKENS = {
    "chatml": _CHATML,
    "llama3": _LLAMA3,
    "llama3.1": _LLAMA3,
    "qwen2.5": _CHATML,
    "qwen3": _CHATML,
    "gemma": _GEMMA,
    "gemma3": _GEMMA,
    "mistral-v3": _MISTRAL_V3,
    "mistral-v7": (*_MISTRAL_V3, "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]"),
    "zephyr": ("<|system|>", "<|user|>", "<|assistant|>"),
    "phi3": ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
    "phi4": (*_CHATML, "<|im_sep|>"),
    "olmo2": ("<|system|>", "<|user|>", "<|assistant|>"),
    "granite": ("<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>", "<|tool_call|>"),
    "deepseek": (*_DEEPSEEK, *_DEEPSEEK_TOOLS, "<｜tool▁sep｜>"),
}
"""Built-in template -> the control tokens that it writes, besides BOS and EOS: what tiny tokenizers lack."""
