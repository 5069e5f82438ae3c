"""Messages -> text, by a chat template in Jinja, exactly as transformers' `apply_chat_template` renders it.

A template comes from a name (chatml, llama2, llama3, plain), from a file, or from the tokenizer's own folder. Its text
is exported with the trained model, headed by defaults for the variables that it was trained with
(`{% if enable_thinking is not defined %}{% set enable_thinking = false %}...`): what was trained is what serves.
"""

import difflib
import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from sft_jax.data.tokenizer import Tokenizer
from sft_jax.data.tokenizer_files import SPECIAL_ROLES
from sft_jax.datatypes import ConfigError, DataError, Message

BUILTIN_TEMPLATES = ("chatml", "llama2", "llama3", "plain")
_BUILTIN_DIR = Path(__file__).parent / "chat_templates"
_RESERVED = ("messages", "add_generation_prompt", "tools", "documents", *SPECIAL_ROLES)


class TemplateError(DataError):
    """A template refused messages, or failed on them."""


class ChatTemplate:
    """A compiled template with its variables.

    Attributes:
      name: as messages call it: a built-in name, a path, or the tokenizer's folder.
      text: the Jinja text to export; empty where there is no template, and then `render` refuses.
      reads_clock: whether a rendering has asked for today's date (`strftime_now`) with no date given as `now`.
    """

    def __init__(self, name: str, text: str, variables: Mapping[str, Any], kwargs: Mapping[str, Any]):
        """`variables` are the tokenizer's (`bos_token`, ...), `kwargs` the user's.

        Raises:
          ConfigError: a syntax error, or a `now` that is no ISO date.
        """
        self.name = name
        self._raw, self._given = text, variables
        self.kwargs = dict(kwargs)
        self.reads_clock = False
        self._now = _read_date(kwargs["now"]) if "now" in kwargs else None
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals |= {"raise_exception": _raise_exception, "strftime_now": self._strftime_now}
        self._variables = {**environment.globals, "tools": None, "documents": None, **variables, **kwargs}
        try:
            environment.parse(text)
        except jinja2.TemplateSyntaxError as error:
            raise ConfigError(
                f"config.data.chat_template: {name}, line {error.lineno}: {error.message}. Mend the template."
            ) from error
        self.text = _default_variables(kwargs) + text if text else ""
        self._template = environment.from_string(self.text)

    @property
    def variables_read(self):
        import jinja2.meta

        env = self._template.environment
        return jinja2.meta.find_undeclared_variables(env.parse(self.text)) - {
            *_RESERVED,
            "raise_exception",
            "strftime_now",
        }

    def with_kwargs(self, kwargs):
        return ChatTemplate(self.name, self._raw, self._given, {**self.kwargs, **kwargs})

    def as_dict(self, message):
        return _as_dict(message)

    def render_each(self, requests, tools=()):
        return [self.render(messages, prompt, tools) for messages, prompt in requests]

    def render(self, messages: Sequence[Message], add_generation_prompt: bool, tools=()) -> str:
        """The text of a conversation.

        Args:
          add_generation_prompt: end with what asks the model for an assistant turn.

        Raises:
          ConfigError: there is no template.
          TemplateError: the template refuses these messages.
        """
        if not self.text:
            raise ConfigError(
                f"config.data.chat_template: is empty, and {self.name} has no chat template of its own. "
                f"Choose one of {', '.join(BUILTIN_TEMPLATES)}, or name a Jinja file."
            )
        variables = {
            **self._variables,
            "messages": [_as_dict(message) for message in messages],
            "tools": list(tools) or None,
            "add_generation_prompt": add_generation_prompt,
        }
        template = self._template
        # What template.render does, in a third of the time: it would copy its globals for every call.
        context = template.environment.context_class(template.environment, variables, template.name, template.blocks)
        try:
            return "".join(template.root_render_func(context))
        # What the template's own expressions may raise, besides Jinja's errors.
        except (jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            roles = ", ".join(message.role for message in messages)
            raise TemplateError(f"chat template {self.name} does not take roles [{roles}]: {error}") from error

    def _strftime_now(self, pattern: str) -> str:
        self.reads_clock |= self._now is None
        return (self._now or datetime.now()).strftime(pattern)


def load_template(chat_template: str, tokenizer: Tokenizer, kwargs: Mapping[str, Any]) -> ChatTemplate:
    """Find and compile a template.

    Args:
      chat_template: a built-in name, a Jinja file, or empty for the tokenizer folder's own. Where that has none either,
        the template is empty: documents need none, and the first conversation is refused.
      kwargs: variables of the template, such as `enable_thinking`; `now`, an ISO date, is what `strftime_now` formats.

    Raises:
      ConfigError: no such file, a syntax error, or a name or value in `kwargs` that cannot be.
    """
    for name in kwargs:
        if name in _RESERVED:
            raise ConfigError(f"config.data.chat_template_kwargs.{name}: is set by us. Take it out.")
    if chat_template in BUILTIN_TEMPLATES:
        text = (_BUILTIN_DIR / f"{chat_template}.jinja").read_text(encoding="utf-8")
        if chat_template == "plain" and tokenizer.adds_bos:
            text = "{{- bos_token -}}\n" + text
        return ChatTemplate(chat_template, text, tokenizer.special_tokens, kwargs)
    if not chat_template:
        return ChatTemplate(tokenizer.origin, tokenizer.chat_template, tokenizer.special_tokens, kwargs)
    path = Path(chat_template).expanduser()
    if not path.is_file():
        close = difflib.get_close_matches(chat_template, BUILTIN_TEMPLATES, n=1)
        hint = f"Did you mean {close[0]}?" if close else f"Built in are {', '.join(BUILTIN_TEMPLATES)}."
        raise ConfigError(f"config.data.chat_template: {chat_template!r} is no file and no built-in template. {hint}")
    text = path.read_text(encoding="utf-8")
    if not text.strip():
        raise ConfigError(f"config.data.chat_template: {chat_template} is empty. Write a template into it.")
    return ChatTemplate(chat_template, text, tokenizer.special_tokens, kwargs)


def _as_dict(m):
    d = {"role": m.role, "content": m.content}
    if m.reasoning:
        d["reasoning_content"] = d["thinking"] = d["reasoning"] = m.reasoning
    if m.tool_calls:
        d["tool_calls"] = [
            {"id": c.id, "type": "function", "function": {"name": c.name, "arguments": c.arguments}}
            for c in m.tool_calls
        ]
    if m.tool_call_id:
        d["tool_call_id"] = m.tool_call_id
    if m.name:
        d["name"] = m.name
    return d


def _read_date(value: Any) -> datetime:
    try:
        return datetime.fromisoformat(value)
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
        case bool() | int() | float() | str():
            return json.dumps(value)
        case list() | tuple():
            return f"[{', '.join(_literal(name, item) for item in value)}]"
        case dict():
            return f"{{{', '.join(f'{json.dumps(k)}: {_literal(name, v)}' for k, v in value.items())}}}"
    raise ConfigError(f"config.data.chat_template_kwargs.{name}: is {value!r}; expected what JSON can hold.")


class _GenerationBlock(jinja2.ext.Extension):
    """`{% generation %}` ... `{% endgeneration %}`, by which transformers marks its mask; it renders what it holds."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it so)

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)  # a scope, as the macro call is that transformers makes of it


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter would escape HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
