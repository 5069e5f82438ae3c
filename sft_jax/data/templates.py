"""Messages -> text, by a chat template in Jinja, exactly as transformers' `apply_chat_template` renders it.

A template comes from a name (`BUILTIN_TEMPLATES`), from a file, or from the tokenizer's own folder. Ours are rendered
here; all others are compiled and rendered in a process of their own, with limits. The text is exported with the trained
model, headed by defaults for the variables that it was trained with (`{% if enable_thinking is not defined %}{% set
enable_thinking = false %}...`): what was trained is what serves.
"""

import difflib
import functools
import json
import math
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2

from sft_jax.data.jinja_program import JinjaProgram
from sft_jax.data.jinja_sandbox import DEFAULT_LIMITS, CompileError, LimitError, Limits, RenderError, SandboxedProgram
from sft_jax.data.tokenizer import Tokenizer
from sft_jax.data.tokenizer_files import SPECIAL_ROLES, read_template_file
from sft_jax.datatypes import ConfigError, DataError, Message, ToolCall

BUILTIN_TEMPLATES = (
    *("chatml", "llama2", "llama3", "llama3.1", "qwen2.5", "qwen3", "gemma", "gemma3"),
    *("mistral-v1", "mistral-v3", "mistral-v7", "zephyr", "phi3", "phi4", "olmo2", "granite", "deepseek", "plain"),
)
_BUILTIN_DIR = Path(__file__).parent / "chat_templates"
_PLAIN_BOS = "{{- bos_token -}}\n"
_RESERVED = ("messages", "add_generation_prompt", "tools", "documents", *SPECIAL_ROLES)
_REASONING_NAMES = ("reasoning_content", "thinking", "reasoning")
_PROBE = {"probe_key": "probe_value"}
_PROBE_JSON = json.dumps(_PROBE)
# What the expressions of our own templates may raise, besides Jinja's errors.
_FAILURES = (jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError)


class TemplateError(DataError):
    """A template refused messages, failed on them, or broke a limit. `what` is the message without the advice."""

    @property
    def what(self) -> str:
        return str(self.args[0])

    def __str__(self) -> str:
        return f"{self.what}. Change the messages, or choose another template."


class ChatTemplate:
    """A template with its variables. It can be copied to other processes, which render for themselves.

    Attributes:
      name: as messages call it: a built-in name, a path, or the tokenizer's folder.
      text: the Jinja text to export; empty where there is no template, and then `render` refuses.
      kwargs: the user's variables.
      variables_read: names that the template reads, so that `kwargs` can give them a value to some effect; and those
        that it sets in a branch only.
      reads_clock: whether a rendering has asked for today's date (`strftime_now`) with no date given as `now`.
    """

    def __init__(
        self,
        name: str,
        text: str,
        variables: Mapping[str, Any],
        kwargs: Mapping[str, Any],
        limits: Limits = DEFAULT_LIMITS,
    ):
        """`variables` are the tokenizer's (`bos_token`, ...), `kwargs` the user's.

        Raises:
          ConfigError: the template cannot be compiled, or not within the limits; a `now` that is no ISO date.
        """
        self.name = name
        self.reads_clock = False
        self._given = (name, text, dict(variables), dict(kwargs), limits)
        self._program: JinjaProgram | SandboxedProgram
        self._failures: tuple[type[Exception], ...]
        if text in _own_texts():
            self._program, self._failures = JinjaProgram(text, sandboxed=False), _FAILURES
        else:
            self._program, self._failures = SandboxedProgram(text, limits), (RenderError,)
        self._set_kwargs(kwargs)
        try:
            self.variables_read = frozenset(self._program.variables_read() - {*_RESERVED})
        except CompileError as error:
            raise self._config_error(error) from error

    def _set_kwargs(self, kwargs: Mapping[str, Any]) -> None:
        if "now" in kwargs:
            _check_date(kwargs["now"])
        _, text, variables, _, _ = self._given
        self.kwargs = dict(kwargs)
        self.text = _default_variables(kwargs) + text if text else ""
        self._variables = {"tools": None, "documents": None, **variables, **kwargs}

    def with_kwargs(self, kwargs: Mapping[str, Any]) -> "ChatTemplate":
        """The same template with these variables set besides; compiled once for both."""
        other = type(self).__new__(type(self))
        other.__dict__.update({k: v for k, v in vars(self).items() if k not in ("tool_arguments", "reads_clock")})
        other.reads_clock = False
        other._set_kwargs({**self.kwargs, **kwargs})
        return other

    def __reduce__(self) -> tuple[Any, ...]:
        name, text, variables, _, limits = self._given
        return type(self), (name, text, variables, self.kwargs, limits)

    def close(self) -> None:
        """End the process that renders, if there is one; the next rendering starts another."""
        if isinstance(self._program, SandboxedProgram):
            self._program.close()

    @functools.cached_property
    def tool_arguments(self) -> str:
        """The form in which the template writes the arguments of a call as JSON, or otherwise as data: `object`, which
        is tried first, or `string`. Empty: it leaves calls out, or takes none."""
        for form, arguments in (("object", _PROBE), ("string", _PROBE_JSON)):
            call = {"id": "probe0001", "type": "function", "function": {"name": "probe_tool", "arguments": arguments}}
            question: dict[str, Any] = {"role": "user", "content": "Probe."}
            messages = [question, {"role": "assistant", "content": "", "tool_calls": [call]}]
            try:
                text = self._render_each(messages, [([0, 1], False)], ())[0]
            except TemplateError:
                continue
            as_data = "probe_key" in text and "probe_value" in text and str(_PROBE) not in text
            if _PROBE_JSON in text or (form == "object" and as_data):
                return form
        return ""

    def render(
        self, messages: Sequence[Message], add_generation_prompt: bool, tools: Sequence[Mapping[str, Any]] = ()
    ) -> str:
        """The text of a conversation.

        Args:
          add_generation_prompt: end with what asks the model for an assistant turn.
          tools: schemas, exactly as the template shall see them.

        Raises:
          ConfigError: there is no template.
          TemplateError: the template refuses these messages, or breaks a limit on them.
        """
        return self.render_each(messages, [(range(len(messages)), add_generation_prompt)], tools)[0]

    def render_each(
        self,
        messages: Sequence[Message],
        requests: Sequence[tuple[Sequence[int], bool]],
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> list[str]:
        """The texts of several requests (numbers of messages, add_generation_prompt), at the price of one where the
        template runs in another process. Raises what `render` raises."""
        if not self.text:
            raise ConfigError(
                f"config.data.chat_template: is empty, and {self.name} has no chat template of its own. "
                f"Choose one of {', '.join(BUILTIN_TEMPLATES)}, or name a Jinja file."
            )
        return self._render_each([self._as_dict(message) for message in messages], requests, tools)

    def _render_each(
        self,
        messages: Sequence[Mapping[str, Any]],
        requests: Sequence[tuple[Sequence[int], bool]],
        tools: Sequence[Mapping[str, Any]],
    ) -> list[str]:
        variables = {**self._variables, "tools": list(tools)} if tools else self._variables
        try:
            texts, read_clock = self._program.render_each(variables, messages, requests)
        except CompileError as error:
            raise self._config_error(error) from error
        except LimitError as error:
            where = f"chat template {self.name} {error}, on a conversation of roles [{_roles(messages, requests)}]"
            raise TemplateError(where) from error
        except self._failures as error:
            where = f"chat template {self.name} does not take roles [{_roles(messages, requests)}]"
            raise TemplateError(f"{where}: {str(error).rstrip(' .')}") from error
        self.reads_clock |= read_clock
        return texts

    def _as_dict(self, message: Message) -> dict[str, Any]:
        """A message as users of transformers pass it: what is empty is absent."""
        shown: dict[str, Any] = {"role": message.role, "content": message.content}
        if message.role == "assistant":
            if message.reasoning:
                shown |= dict.fromkeys(self._reasoning_names, message.reasoning)
            if message.tool_calls:
                shown["tool_calls"] = [self._call_as_dict(call) for call in message.tool_calls]
        elif message.role == "tool":
            if message.tool_call_id:
                shown["tool_call_id"] = message.tool_call_id
            if message.name:
                shown["name"] = message.name
        return shown

    def _call_as_dict(self, call: ToolCall) -> dict[str, Any]:
        arguments = call.arguments_json if self.tool_arguments == "string" else call.arguments
        shown = {"type": "function", "function": {"name": call.name, "arguments": arguments}}
        return {"id": call.id, **shown} if call.id else shown

    @functools.cached_property
    def _reasoning_names(self) -> tuple[str, ...]:
        """Names under which a message's reasoning is given: each that stands in the template, as some read one and fall
        back on another; where none does, the most usual."""
        found = tuple(name for name in _REASONING_NAMES if re.search(rf"\b{name}\b", self.text))
        return found or _REASONING_NAMES[:1]

    def _config_error(self, error: CompileError) -> ConfigError:
        where = f"config.data.chat_template: {self.name}" + (f", line {error.line}" if error.line else "")
        return ConfigError(f"{where}: {error}. Mend the template.")


def _roles(messages: Sequence[Mapping[str, Any]], requests: Sequence[tuple[Sequence[int], bool]]) -> str:
    longest = max((numbers for numbers, _ in requests), key=len)
    return ", ".join(messages[i]["role"] for i in longest)


@functools.cache
def _own_texts() -> frozenset[str]:
    """Texts that are known to be harmless: none, and the built-in templates as they are exported."""
    texts = [_builtin_text(name) for name in BUILTIN_TEMPLATES]
    return frozenset(["", _PLAIN_BOS + _builtin_text("plain"), *texts])


@functools.cache
def _builtin_text(name: str) -> str:
    return (_BUILTIN_DIR / f"{name}.jinja").read_text(encoding="utf-8")


def load_template(chat_template: str, tokenizer: Tokenizer, kwargs: Mapping[str, Any]) -> ChatTemplate:
    """Find and compile a template.

    Args:
      chat_template: a built-in name, a Jinja file, or empty for the tokenizer folder's own. Where that has none either,
        the template is empty: documents need none, and the first conversation is refused.
      kwargs: variables of the template, such as `enable_thinking`; `now`, an ISO date, is what `strftime_now` formats.

    Raises:
      ConfigError: no such file, a syntax error, or a name or value in `kwargs` that cannot be.
    """
    template = _find_template(chat_template, tokenizer, kwargs)
    for name in kwargs if template.text else ():
        if name not in template.variables_read and not (name == "now" and "strftime_now" in template.text):
            close = difflib.get_close_matches(name, template.variables_read, n=1)
            hint = f"Did you mean {close[0]}?" if close else "Take it out."
            what = f"chat template {template.name} does not read it"
            raise ConfigError(f"config.data.chat_template_kwargs.{name}: {what}. {hint}")
    return template


def _find_template(chat_template: str, tokenizer: Tokenizer, kwargs: Mapping[str, Any]) -> ChatTemplate:
    for name in kwargs:
        if name in _RESERVED:
            raise ConfigError(f"config.data.chat_template_kwargs.{name}: is set by us. Take it out.")
        if not name.isidentifier():
            raise ConfigError(f"config.data.chat_template_kwargs: {name!r} is no name of a variable. Take it out.")
    if chat_template in BUILTIN_TEMPLATES:
        text = _builtin_text(chat_template)
        if chat_template == "plain" and tokenizer.adds_bos:
            text = _PLAIN_BOS + text
        return ChatTemplate(chat_template, text, tokenizer.special_tokens, kwargs)
    if not chat_template:
        return ChatTemplate(tokenizer.origin, tokenizer.chat_template, tokenizer.special_tokens, kwargs)
    path = Path(chat_template).expanduser()
    if not path.is_file():
        close = difflib.get_close_matches(chat_template, BUILTIN_TEMPLATES, n=1)
        hint = f"Did you mean {close[0]}?" if close else f"Built in are {', '.join(BUILTIN_TEMPLATES)}."
        raise ConfigError(f"config.data.chat_template: {chat_template!r} is no file and no built-in template. {hint}")
    text = read_template_file(path)
    if not text.strip():
        raise ConfigError(f"config.data.chat_template: {chat_template} is empty. Write a template into it.")
    return ChatTemplate(chat_template, text, tokenizer.special_tokens, kwargs)


def _check_date(value: Any) -> None:
    try:
        datetime.fromisoformat(value)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"config.data.chat_template_kwargs.now: is {value!r}; expected a date, 2026-01-31."
        ) from error


def _default_variables(kwargs: Mapping[str, Any]) -> str:
    """Jinja that sets each variable where the server gives none; on a line of its own, so that it writes nothing."""
    lines = (
        f"{{%- if {name} is not defined -%}}{{%- set {name} = {_literal(name, value)} -%}}{{%- endif %}}\n"
        for name, value in kwargs.items()
        if name != "now"  # at serving, today is today
    )
    return "".join(lines)


def _literal(name: str, value: Any) -> str:
    """A JSON-like value as Jinja writes it."""
    match value:
        case None:
            return "none"
        case float() if not math.isfinite(value):
            pass
        case bool() | int() | float() | str():
            return json.dumps(value, ensure_ascii=False)
        case list() | tuple():
            return f"[{', '.join(_literal(name, item) for item in value)}]"
        case dict():
            return f"{{{', '.join(f'{_literal(name, k)}: {_literal(name, v)}' for k, v in value.items())}}}"
    raise ConfigError(f"config.data.chat_template_kwargs.{name}: is {value!r}; expected what JSON can hold.")
