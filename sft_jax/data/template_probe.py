"""Tokenizer and chat template -> how the template ends a turn and marks reasoning, or a refusal that says why not.

The template is tried on probes: a question and an answer, an answer with reasoning before it, a call of a tool. What it
writes around them is searched for control tokens of the tokenizer; and all that it writes, for control tokens that the
tokenizer does not have.
"""

import contextlib
import re
from dataclasses import dataclass
from typing import NamedTuple

from sft_jax.data.template_coverage import TemplateCoverage
from sft_jax.data.templates import ChatTemplate, TemplateError
from sft_jax.data.tokenizer import Tokenizer
from sft_jax.datatypes import ConfigError, Message, ToolCall

_SYSTEM, _USER, _ANSWER = (Message(role, f"Probe {role}.") for role in ("system", "user", "assistant"))
_THOUGHT = _ANSWER._replace(reasoning="Probe reasoning.")
_CALL = ToolCall("probe_tool", {"probe_key": "probe_value"}, '{"probe_key": "probe_value"}', id="probe0001")
_CALLING = Message("assistant", "", tool_calls=(_CALL,))
_RESULT = Message("tool", "Probe result.", tool_call_id=_CALL.id, name=_CALL.name)
_SCHEMA = {
    "type": "function",
    "function": {
        "name": _CALL.name,
        "description": "Probe.",
        "parameters": {"type": "object", "properties": {"probe_key": {"type": "string", "description": "Probe."}}},
    },
}
_MARKER = re.compile(r"<\|[^<>|\s]+\|>|<｜[^<>｜]+｜>|<(?:start|end)_of_turn>")  # how control tokens are spelt
# Mistral's, since version 2 of its tokenizers; version 1 and Llama-2 write `[INST]` as plain text. So a template means
# control tokens by `[INST]` if it writes, anywhere, one of those that have come with them.
# Source: mistralai/mistral-common, tokens/tokenizers/base.py, SpecialTokens.
_ONLY_TOKENS = ("[AVAILABLE_TOOLS]", "[TOOL_CALLS]", "[TOOL_RESULTS]", "[SYSTEM_PROMPT]")
_BRACKETS = re.compile(
    r"\[/?(?:INST|AVAILABLE_TOOLS|TOOL_RESULTS|SYSTEM_PROMPT|THINK)\]|\[(?:TOOL_CALLS|TOOL_CONTENT|ARGS|CALL_ID)\]"
)
_OPENS = re.compile(r"(<[^<>/\s]+>|\[[A-Z_]+\])\s*$")
_CLOSES = re.compile(r"\s*(</[^<>\s]+>|\[/[A-Z_]+\])")
_OWN_DEFAULT = re.compile(r"\{%- if (\w+) is not defined -%\}\{%- set \1 = .*\n")  # as templates.py heads an export


class StopToken(NamedTuple):
    text: str
    is_written: bool  # by the template; or it is added behind what the template writes


class ReasoningMarks(NamedTuple):
    """What the template writes around reasoning, such as `<think>` and `</think>`."""

    opens: str
    closes: str


@dataclass(frozen=True)
class TemplateFacts:
    """What the probes showed.

    `call_stop` ends a turn that calls tools: `stop.text` in most templates. `lacking` are the control tokens around
    tools, calls and results that the tokenizer does not have, which matters only to rows with some. `coverage` tells
    what the template leaves out, as rows come.
    """

    stop: StopToken
    call_stop: str
    reasoning: ReasoningMarks | None
    lacking: tuple[str, ...]
    coverage: TemplateCoverage


def probe_template(tokenizer: Tokenizer, template: ChatTemplate, stop_token: str) -> TemplateFacts:
    """Try the template.

    Args:
      stop_token: the option `config.data.stop_token`; empty: the first control token behind the answer, or of several
        side by side (`<|END_RESPONSE|><|END_OF_TURN_TOKEN|>`) the last. One that the template does not write is put
        behind all that it writes for the turn.

    Raises:
      ConfigError: the template's generation prompt is no prefix of the turn; it writes no stop token; or its control
        tokens are not tokens of the tokenizer.
    """
    if stop_token and tokenizer.token_id(stop_token) is None:
        raise ConfigError(
            f"config.data.stop_token: {stop_token!r} is not one control token of {tokenizer.origin}. "
            f"Add it: config.data.new_tokens = ({stop_token!r},)."
        )
    coverage = TemplateCoverage(template)
    if not template.text:  # documents only
        return TemplateFacts(StopToken(stop_token or tokenizer.eos_token, is_written=False), "", None, (), coverage)
    stop = _find_stop(tokenizer, template, stop_token)
    called, answered = _render_tools(template), _render_tools(template, _RESULT, _ANSWER)
    return TemplateFacts(
        stop,
        _find_call_stop(tokenizer, template, stop, called),
        _find_reasoning(template),
        _missing_markers(tokenizer, template, called, answered),
        coverage,
    )


def _find_stop(tokenizer: Tokenizer, template: ChatTemplate, stop_token: str) -> StopToken:
    where = f"config.data.chat_template: {template.name}"
    try:
        prompt, whole = template.render_each((_USER, _ANSWER), [([0], True), ([0, 1], False)])
    except TemplateError as error:
        raise ConfigError(f"config.data.chat_template: {error.what}. Choose another template.") from error
    _check_markers(tokenizer, template, prompt, whole)
    if not whole.startswith(prompt):
        asked, written = heads_of_difference(prompt, whole)
        raise ConfigError(
            f"{where}: its generation prompt is no prefix of an assistant turn: it asks with {asked} and the turn goes "
            f"on with {written}, so the model would be trained on what it is not asked. Set "
            "config.data.chat_template_kwargs, for example enable_thinking, or choose another template."
        )
    _, answer, after = whole[len(prompt) :].partition(_ANSWER.content)
    if not answer or _USER.content not in prompt:
        whose = "user" if answer else "assistant"
        raise ConfigError(f"{where}: leaves out the {whose}'s text; it may expect images. Choose another template.")
    if stop_token:
        return StopToken(stop_token, is_written=tokenizer.control.ids[stop_token] in tokenizer.control.split(after))
    stop = tokenizer.control.first_run(after)
    if not stop:
        what = f"ends an assistant turn with {after!r}, in which there is no control token of {tokenizer.origin}"
        raise ConfigError(
            f"{where}: {what if after.strip() else 'writes no stop token after an assistant turn'}. Set "
            "config.data.stop_token to the token that shall end it; a new one belongs in config.data.new_tokens too."
        )
    return StopToken(stop[-1], is_written=True)


def heads_of_difference(prompt: str, whole: str) -> tuple[str, str]:
    """How each text goes on from the first character in which they differ, for a message."""
    at = next((k for k, (a, b) in enumerate(zip(prompt, whole, strict=False)) if a != b), min(len(prompt), len(whole)))
    asked, written = (repr(text[at : at + 40]) if text[at:] else "nothing" for text in (prompt, whole))
    return asked, written


def _check_markers(tokenizer: Tokenizer, template: ChatTemplate, *texts: str) -> None:
    """Refuse a template that writes control tokens, or tokens with a role (bos_token, ...), that are not single ids."""
    with contextlib.suppress(TemplateError):  # it may take no system message
        texts = (*texts, template.render([_SYSTEM, _USER, _ANSWER], add_generation_prompt=True))
    missing = _missing_markers(tokenizer, template, *texts)
    if missing:
        raise ConfigError(
            f"config.data.chat_template: {template.name} writes {', '.join(map(repr, missing))}, which "
            f"{tokenizer.origin} does not have as single tokens. Add them to config.data.new_tokens, as "
            f"{missing!r}, or choose another template."
        )


def _missing_markers(tokenizer: Tokenizer, template: ChatTemplate, *texts: str) -> tuple[str, ...]:
    """What is a control token to the template, and plain text to the tokenizer."""
    plain = "\n".join(part for text in texts for part in tokenizer.control.split(text) if isinstance(part, str))
    missing = [*_MARKER.findall(plain), *(text for text in tokenizer.special_tokens.values() if text in plain)]
    if any(token in template.text for token in _ONLY_TOKENS):
        missing += _BRACKETS.findall(plain)
    return tuple(dict.fromkeys(missing))


def _render_tools(template: ChatTemplate, *after: Message) -> str:
    """A question, a call of a tool, and what comes after it; empty for a template that does not take that, and will say
    so of a row."""
    try:
        return template.render((_USER, _CALLING, *after), add_generation_prompt=False, tools=(_SCHEMA,))
    except TemplateError:
        return ""


def _find_call_stop(tokenizer: Tokenizer, template: ChatTemplate, stop: StopToken, called: str) -> str:
    """The token that ends a turn which calls a tool: the stop token, or else the last one behind the call."""
    _, _, after = called.rpartition(_CALL.arguments["probe_key"])
    parts = tokenizer.control.split(after)
    control = [tokenizer.control.texts[part] for part in parts if isinstance(part, int)]
    if stop.text in control or not stop.is_written:
        return stop.text
    return [stop.text, *control, *_missing_markers(tokenizer, template, after)][-1]


def _find_reasoning(template: ChatTemplate) -> ReasoningMarks | None:
    try:
        text = template.render((_USER, _THOUGHT), add_generation_prompt=False)
    except TemplateError:
        return None
    before, reasoning, after = text.partition(_THOUGHT.reasoning)
    opens, closes = _OPENS.search(before), _CLOSES.match(after)
    if not (reasoning and opens and closes):
        return None
    return ReasoningMarks(opens[1], closes[1])


def check_reasoning_is_chosen(template: ChatTemplate, reasoning: ReasoningMarks | None) -> None:
    """Refuse to guess: where the generation prompt opens or closes a reasoning block, and a variable of the template
    would change that, `config.data.chat_template_kwargs` must say which form is trained.

    Raises:
      ConfigError: it does not say.
    """
    if reasoning is None:
        return
    prompt = template.render((_USER,), add_generation_prompt=True)
    after = prompt[prompt.rfind(_USER.content) :]
    if reasoning.opens not in after and reasoning.closes not in after:
        return
    chosen = {*template.kwargs}
    for line in template.text.splitlines(keepends=True):
        default = _OWN_DEFAULT.match(line)
        if not default:
            break
        chosen.add(default[1])
    switches = [name for name in sorted(template.variables_read) if _switches_generation_prompt(template, name)]
    if switches and not chosen.intersection(switches):
        name = switches[0]
        raise ConfigError(
            f"config.data.chat_template: the generation prompt of {template.name} writes {reasoning.opens!r}, and its "
            f"variable {name} changes that, so one of two forms would be trained by chance. Choose: "
            f"config.data.chat_template_kwargs = dict({name}=True), or False."
        )


def _switches_generation_prompt(template: ChatTemplate, name: str) -> bool:
    texts = set()
    for value in (True, False):
        with contextlib.suppress(TemplateError, ConfigError):
            texts.add(template.with_kwargs({name: value}).render((_USER,), add_generation_prompt=True))
    return len(texts) > 1
