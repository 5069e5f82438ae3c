"""Tokenizer and chat template -> the token that ends an assistant turn, or a refusal that says why there is none.

The template is tried on a probe of one question and one answer. What it writes after the answer is searched for a
control token of the tokenizer; and all that it writes, for control tokens that the tokenizer does not have.
"""

import contextlib
import re
from typing import NamedTuple

from sft_jax.data.templates import ChatTemplate, TemplateError
from sft_jax.data.tokenizer import Tokenizer
from sft_jax.datatypes import ConfigError, Message

_SYSTEM, _USER, _ANSWER = (Message(role, f"Probe {role}.") for role in ("system", "user", "assistant"))
_MARKER = re.compile(r"<\|[^<>|\s]+\|>|<｜[^<>｜]+｜>|<(?:start|end)_of_turn>")  # how control tokens are spelt


class StopToken(NamedTuple):
    text: str
    is_written: bool  # by the template; or it is added behind what the template writes


def find_stop(tokenizer: Tokenizer, template: ChatTemplate, stop_token: str) -> StopToken:
    """Find the stop token, or take the one given.

    Args:
      stop_token: the option `config.data.stop_token`; empty: the first control token behind the answer. One that the
        template does not write is put behind all that it writes for the turn.

    Raises:
      ConfigError: the template's generation prompt is no prefix of the turn; it writes no stop token; or its control
        tokens are not tokens of the tokenizer.
    """
    where = f"config.data.chat_template: {template.name}"
    if stop_token and tokenizer.token_id(stop_token) is None:
        raise ConfigError(
            f"config.data.stop_token: {stop_token!r} is not one control token of {tokenizer.origin}. "
            f"Add it: config.data.new_tokens = ({stop_token!r},)."
        )
    if not template.text:  # documents only
        return StopToken(stop_token or tokenizer.eos_token, is_written=False)
    try:
        prompt = template.render([_USER], add_generation_prompt=True)
        whole = template.render([_USER, _ANSWER], add_generation_prompt=False)
    except TemplateError as error:
        raise ConfigError(f"config.data.chat_template: {error}. Choose another template.") from error
    _check_markers(tokenizer, template, prompt, whole)
    if not whole.startswith(prompt):
        at = next(k for k in range(len(whole) + 1) if whole[: k + 1] != prompt[: k + 1])
        raise ConfigError(
            f"{where}: its generation prompt is no prefix of an assistant turn: it asks with {prompt[at:][:40]!r} and "
            f"the turn goes on with {whole[at:][:40]!r}, so the model would be trained on what it is not asked. Set "
            "config.data.chat_template_kwargs, for example enable_thinking, or choose another template."
        )
    _, answer, after = whole[len(prompt) :].partition(_ANSWER.content)
    if not answer or _USER.content not in prompt:
        whose = "user" if answer else "assistant"
        raise ConfigError(f"{where}: leaves out the {whose}'s text; it may expect images. Choose another template.")
    control = [part for part in tokenizer.control.split(after) if isinstance(part, int)]
    if stop_token:
        return StopToken(stop_token, is_written=tokenizer.control.ids[stop_token] in control)
    if not control:
        what = f"ends an assistant turn with {after!r}, in which there is no control token of {tokenizer.origin}"
        raise ConfigError(
            f"{where}: {what if after.strip() else 'writes no stop token after an assistant turn'}. Set "
            "config.data.stop_token to the token that shall end it; a new one belongs in config.data.new_tokens too."
        )
    return StopToken(tokenizer.control.texts[control[0]], is_written=True)


def _check_markers(tokenizer: Tokenizer, template: ChatTemplate, *texts: str) -> None:
    """Refuse a template that writes control tokens, or tokens with a role (bos_token, ...), that are not single ids."""
    with contextlib.suppress(TemplateError):  # it may take no system message
        texts = (*texts, template.render([_SYSTEM, _USER, _ANSWER], add_generation_prompt=True))
    plain = "\n".join(part for text in texts for part in tokenizer.control.split(text) if isinstance(part, str))
    missing = [*_MARKER.findall(plain), *(text for text in tokenizer.special_tokens.values() if text in plain)]
    if missing:
        missing = list(dict.fromkeys(missing))
        raise ConfigError(
            f"config.data.chat_template: {template.name} writes {', '.join(map(repr, missing))}, which "
            f"{tokenizer.origin} does not have as single tokens. Add them to config.data.new_tokens, as "
            f"{tuple(missing)!r}, or choose another template."
        )
