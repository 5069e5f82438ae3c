"""Jinja text and variables -> a rendering, exactly as transformers renders it: for our own templates as a module, for
others' as a program in a process of its own, which `jinja_sandbox.py` starts and watches.

Frames on stdin and stdout are JSON behind its length in 4 bytes. The first is the template with its limits:

    {"text": "...", "cpu_seconds": 2.0, ...}       ->  {"reads": ["enable_thinking"]} or {"error": "...", "line": 3}
    {"variables": {...}, "messages": [{...}, ...],
     "requests": [[[0, 1], true], ...]}            ->  {"texts": ["..."], "clock": false} or {"error": "..."}

A request names its messages by number and says whether the generation prompt is asked for. Only light modules are
imported, so that the program starts in a tenth of a second.
"""

import contextlib
import functools
import json
import resource
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import IO, Any

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.parser
import jinja2.utils
from jinja2.sandbox import ImmutableSandboxedEnvironment

LENGTH_BYTES = 4
_ERROR_CHARS = 1000
_NO_LIMIT = contextlib.nullcontext()


class OutputError(Exception):
    """A rendering is longer than the limit."""


class JinjaProgram:
    """A compiled template."""

    def __init__(self, text: str, sandboxed: bool):
        """Raises whatever compiling raises, `jinja2.TemplateSyntaxError` with a line first of all."""
        self._now: datetime | None = None
        self._read_clock = False
        self._environment = make_environment(sandboxed)
        self._environment.globals["strftime_now"] = self._strftime_now
        template = self._environment.from_string(text)
        self._context = self._environment.context_class(self._environment, {}, template.name, template.blocks)
        self._root = template.root_render_func
        self._text = text

    def variables_read(self) -> set[str]:
        """Names that the template reads and does not set itself, but for Jinja's and our own functions."""
        read = jinja2.meta.find_undeclared_variables(self._environment.parse(self._text))
        return read - self._environment.globals.keys()

    def render_each(
        self,
        variables: Mapping[str, Any],
        messages: Sequence[Mapping[str, Any]],
        requests: Sequence[tuple[Sequence[int], bool]],
        limit: Callable[[], contextlib.AbstractContextManager[None]] | None = None,
        max_chars: int | None = None,
    ) -> tuple[list[str], bool]:
        """Texts, and whether one has asked for today's date (`strftime_now`) with no date given.

        Args:
          variables: `now`, if there, is the ISO date that `strftime_now` formats.
          requests: numbers of the messages, and whether the generation prompt is asked for.
          limit: what each rendering runs within; None: nothing.
          max_chars: of one text; None: any number.
        """
        self._now = datetime.fromisoformat(variables["now"]) if "now" in variables else None
        self._read_clock = False
        variables = {**self._environment.globals, **variables}
        texts = []
        for numbers, add_generation_prompt in requests:
            variables |= {"messages": [messages[i] for i in numbers], "add_generation_prompt": add_generation_prompt}
            with limit() if limit else _NO_LIMIT:
                texts.append(self._render(variables, max_chars))
        return texts, self._read_clock

    def _render(self, variables: dict[str, Any], max_chars: int | None) -> str:
        # What template.render does, in a fifth of the time: it would make a context for every call, which looks for a
        # name among the variables that the template sets and then among those that it was given.
        names = _Names(variables)
        self._context.vars = self._context.parent = names
        self._context.resolve_or_missing = names.__getitem__  # type: ignore[method-assign, assignment]
        self._context.exported_vars.clear()
        pieces = self._root(self._context)
        return "".join(pieces if max_chars is None else _counted(pieces, max_chars))

    def _strftime_now(self, pattern: str) -> str:
        self._read_clock |= self._now is None
        return (self._now or datetime.now()).strftime(pattern)


def _counted(pieces: Iterable[str], max_chars: int) -> Iterator[str]:
    num_chars = 0
    for piece in pieces:
        num_chars += len(piece)
        if num_chars > max_chars:
            raise OutputError
        yield piece


def make_environment(sandboxed: bool) -> jinja2.Environment:
    """Jinja as transformers sets it up for chat templates. Our own need no sandbox, which takes half of their time."""
    kind = _SandboxedEnvironment if sandboxed else _Environment
    environment = kind(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, jinja2.ext.loopcontrols])
    environment.filters["tojson"] = _to_json
    environment.globals |= {"raise_exception": _raise_exception, "dict": _Dict(), "namespace": _Namespace}
    return environment


_DICT_ATTRIBUTES = frozenset(dir(dict))


class _QuickLookups:
    """`message.role` as Jinja reads it, in half of the time: messages are plain dicts without attributes of such names,
    which Jinja would find out by an exception each time."""

    undefined: type[jinja2.Undefined]

    def getattr(self, obj: Any, attribute: str) -> Any:
        if type(obj) is dict and attribute not in _DICT_ATTRIBUTES:
            return obj[attribute] if attribute in obj else self.undefined(obj=obj, name=attribute)
        return super().getattr(obj, attribute)  # type: ignore[misc]


class _Names(dict[str, Any]):
    """A template's variables. A name that is not there is `missing`, as Jinja says it."""

    def __missing__(self, name: str) -> Any:
        return jinja2.utils.missing


class _Environment(_QuickLookups, jinja2.Environment):
    pass


class _SandboxedEnvironment(_QuickLookups, ImmutableSandboxedEnvironment):
    pass


class _GenerationBlock(jinja2.ext.Extension):
    """`{% generation %}` ... `{% endgeneration %}`, by which transformers marks its mask; it renders what it holds."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it so)

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)  # a scope, as the macro call is that transformers makes of it


class _Dict:
    """`dict(...)` without the type itself, whose methods would change what the sandbox holds immutable."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _Namespace(jinja2.utils.Namespace):
    """`namespace(...)` that keeps no name with a leading underscore, of which Python's own machinery is made."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, *given = args
        values = dict(*given, **kwargs)
        for name in values:
            _Namespace._check(name)
        jinja2.utils.Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _Namespace._check(name)
        super().__setitem__(name, value)

    @staticmethod
    def _check(name: Any) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a namespace cannot hold {name!r}")


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


# --- The program -----------------------------------------------------------------------------------------------------


def serve(source: IO[bytes], sink: IO[bytes]) -> None:
    """Answer frames until the parent closes the pipe."""
    first = _read_frame(source)
    _limit_resources(first["memory_bytes"])
    limit = functools.partial(_limit_cpu, first["cpu_seconds"])
    try:
        with limit():
            program = JinjaProgram(first["text"], sandboxed=True)
            answer = json.dumps({"reads": sorted(program.variables_read())})
    except Exception as error:  # whatever it is, it is the template's doing, and the parent tells of it
        _write_frame(sink, json.dumps(_describe(error) | {"line": getattr(error, "lineno", None)}))
        return
    _write_frame(sink, answer)
    while frame := _read_frame(source):
        try:
            texts, clock = program.render_each(**frame, limit=limit, max_chars=first["output_chars"])
            answer = json.dumps({"texts": texts, "clock": clock})
        except Exception as error:
            answer = json.dumps(_describe(error))
        _write_frame(sink, answer)


def _describe(error: Exception) -> dict[str, Any]:
    limit = {MemoryError: "memory", OutputError: "output"}.get(type(error), "")
    message = getattr(error, "message", None) or error  # of a syntax error, without the line
    return {"limit": limit, "error": (str(message) or type(error).__name__)[:_ERROR_CHARS]}


@contextlib.contextmanager
def _limit_cpu(seconds: float) -> Iterator[None]:
    """The kernel ends this process (SIGPROF) when what is within takes longer, even deep in C code."""
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def _limit_resources(memory_bytes: int) -> None:
    for name, value in (("RLIMIT_CORE", 0), ("RLIMIT_FSIZE", 0), ("RLIMIT_AS", _address_space() + memory_bytes)):
        with contextlib.suppress(ValueError, OSError):  # not every system knows each limit
            resource.setrlimit(getattr(resource, name), (value, value))


def _address_space() -> int:
    """Bytes that this process has mapped; 0 where the system does not tell."""
    with contextlib.suppress(OSError), open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * resource.getpagesize()
    return 0


def _read_frame(source: IO[bytes]) -> dict[str, Any]:
    """Empty when the pipe is closed."""
    head = source.read(LENGTH_BYTES)
    return json.loads(source.read(int.from_bytes(head, "little"))) if len(head) == LENGTH_BYTES else {}


def _write_frame(sink: IO[bytes], value: str) -> None:
    content = value.encode()
    sink.write(len(content).to_bytes(LENGTH_BYTES, "little") + content)
    sink.flush()


if __name__ == "__main__":
    # It ends with its parent, whose pipe then closes, and not when a signal goes to a whole group of processes.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.dont_write_bytecode = True
    serve(sys.stdin.buffer, sys.stdout.buffer)
