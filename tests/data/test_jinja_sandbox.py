"""A foreign template can refuse, fail or run wild: it costs a row, never the process that asked."""

import gc
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from sft_jax.data import templates
from sft_jax.data.jinja_sandbox import LimitError, Limits, SandboxedProgram
from sft_jax.data.templates import ChatTemplate, TemplateError
from sft_jax.datatypes import ConfigError, Message

BUILTINS = templates._BUILTIN_DIR
LIMITS = Limits(cpu_seconds=0.4, wall_seconds=20.0, memory_bytes=192 << 20, output_chars=100_000)
HARMLESS, HARMFUL = (Message("user", "good"),), (Message("user", "bad"),)
TIME, MEMORY, OUTPUT = (
    "needs more than 0.4 s of a core",
    "needs more than 192 MiB",
    "writes more than 100,000 characters",
)


def template(text, limits=LIMITS, **kwargs):
    return ChatTemplate("wild.jinja", text, {"bos_token": "<s>"}, kwargs, limits)


def two_faced(text):
    """A template that is hostile to `HARMFUL` only."""
    return template("{% if messages[0].content == 'bad' %}" + text + "{% else %}ok{% endif %}")


DOUBLING = "{% set s = namespace(x=START) %}{% for i in range(99) %}{% set s.x = s.x OP s.x %}{% endfor %}"
# `n` is not known when the template is compiled.
HOSTILE = {
    "nested loops": ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", TIME),
    "a loop inside C": ("{{ (n + 8) ** (9 ** 9) }}", TIME),
    "a sum of many": ("{{ (range(99999) | list * (n * 999)) | sum }}", f"{TIME}|{MEMORY}"),
    "a long string": ("{{ ('a' * (n * 10**9)) | length }}", MEMORY),
    "a list that doubles": (DOUBLING.replace("START", "[n]").replace("OP", "+"), MEMORY),
    "a string that doubles": (DOUBLING.replace("START", "'a'").replace("OP", "~"), MEMORY),
    "tojson of much": ("{{ (range(99999) | list * (n * 99)) | tojson | length }}", f"{TIME}|{MEMORY}"),
    "center": ("{{ 'a'.center(n * 10**9) | length }}", MEMORY),
    "one long output": ("{{ 'a' * (n * 10**6) }}", OUTPUT),
    "many small outputs": ("{% for a in range(99999) %}abc{% endfor %}", OUTPUT),
    "a long macro": ("{% macro f() %}{% for a in range(99999) %}abc{% endfor %}{% endmacro %}{{ f() }}", OUTPUT),
    "range": ("{{ range(10**9) }}", "Range too big"),
    "recursion": ("{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}", "recursion"),
    "a recursive loop": ("{% for x in [1] recursive %}{{ loop([1]) }}{% endfor %}", "recursion"),
    "a huge message": ("{{ raise_exception('a' * (n * 10**6)) }}", "aaa"),
    "not a message": ("{{ raise_exception(n) }}", ": 1"),
    "attributes": ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
    "globals": ("{{ cycler.__init__.__globals__.os.getpid() }}", "unsafe"),
    "format": ("{{ '{0.__class__}'.format(n) + nothing }}", "unsafe|undefined"),
    "a file": ("{% include '/etc/passwd' %}", "no loader"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_template_costs_one_row(name):
    text, words = HOSTILE[name]
    chat_template = two_faced("{% set n = messages | length %}" + text)
    started = time.monotonic()
    with pytest.raises(TemplateError, match=rf"(?s)^chat template wild\.jinja .*({words})") as caught:
        chat_template.render(HARMFUL, add_generation_prompt=False)
    assert time.monotonic() - started < 20
    assert len(str(caught.value)) < 2000
    assert chat_template.render(HARMLESS, add_generation_prompt=False) == "ok"


def test_a_limit_is_named_with_the_template_and_the_roles():
    chat_template = two_faced("{{ 'a' * (messages | length * 10**6) }}")
    with pytest.raises(TemplateError) as caught:
        chat_template.render((*HARMFUL, Message("assistant", "x")), add_generation_prompt=False)
    assert str(caught.value) == (
        "chat template wild.jinja writes more than 100,000 characters, the limit of output, on a conversation of roles "
        "[user, assistant]. Change the messages, or choose another template."
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a\n{{ 9 ** (9 ** 9) }}", "wild.jinja: needs more than 0.4 s"),
        ("a\n{{ 1 | nothing }}", "wild.jinja, line 2: No filter named 'nothing'"),
        ("{{ " + "(" * 20000 + "1" + ")" * 20000 + " }}", "wild.jinja: maximum recursion depth"),
        ("{{ " + "9" * 5000 + " }}", "wild.jinja: Exceeds the limit"),
        ("{% for %}", "wild.jinja, line 1: "),
        ("{{ " + "-" * 900 + "1 }}", "wild.jinja.*(recursion|nested)"),
    ],
)
def test_what_cannot_be_compiled_is_the_configuration_s_fault(text, words):
    with pytest.raises(ConfigError, match=rf"^config\.data\.chat_template: {words}"):
        template(text)


def test_a_process_that_does_not_answer_is_given_up():
    program = SandboxedProgram("ok", Limits(wall_seconds=0.3))
    program.variables_read()
    process = program._process._popen
    os.kill(process.pid, signal.SIGSTOP)
    for messages in ([], [{"role": "user", "content": "x" * 10**6}]):  # the second does not fit into the pipe
        os.kill(process.pid, signal.SIGSTOP)
        with pytest.raises(LimitError, match=r"not answered within 0\.3 s"):
            program.render_each({}, messages, [([], False)])
        assert process.returncode == -signal.SIGKILL
        assert program.render_each({}, [], [([], False)]) == (["ok"], False)
        process = program._process._popen
    program.close()


def test_a_killed_process_is_replaced():
    chat_template = two_faced("")
    assert chat_template.render(HARMLESS, False) == "ok"
    os.kill(chat_template._program._process._popen.pid, signal.SIGKILL)
    with pytest.raises(TemplateError, match="ended its process"):
        chat_template.render(HARMLESS, False)
    assert chat_template.render(HARMLESS, False) == "ok"


def test_signals_to_the_group_are_for_the_parent():
    chat_template = two_faced("")
    assert chat_template.render(HARMLESS, False) == "ok"
    process = chat_template._program._process._popen
    for number in (signal.SIGTERM, signal.SIGINT):
        os.kill(process.pid, number)
    assert chat_template.render(HARMLESS, False) == "ok"
    assert chat_template._program._process._popen is process
    assert os.getpgid(process.pid) != os.getpgid(0)


def test_the_process_ends_with_its_template_and_nobody_warns():
    chat_template = template("x")
    assert chat_template.render(HARMLESS, False) == "x"
    first = chat_template._program._process._popen
    chat_template.close()
    chat_template.close()
    assert first.returncode == -signal.SIGKILL
    assert chat_template.render(HARMLESS, False) == "x"
    second = chat_template._program._process._popen
    del chat_template
    gc.collect()
    assert second.returncode == -signal.SIGKILL


def test_the_process_ends_with_its_parent():
    program = """
        import os, signal
        from sft_jax.data.templates import ChatTemplate
        chat_template = ChatTemplate("x", "x", {}, {})
        chat_template.render([], False)
        print(chat_template._program._process._popen.pid, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    found = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    assert found.returncode == -signal.SIGKILL
    deadline = time.monotonic() + 10
    while is_running(int(found.stdout)):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def is_running(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    with open(f"/proc/{pid}/stat") as file:  # a zombie that nobody waits for has ended too
        return file.read().rpartition(")")[2].split()[0] != "Z"


def render_in_worker(chat_template, answers):
    answers.put((chat_template.render(HARMLESS, False), chat_template._program._process._popen.pid))


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning", "ignore:os.fork:RuntimeWarning")
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_worker_process_has_a_process_of_its_own(method):
    chat_template = two_faced("")
    assert chat_template.render(HARMLESS, False) == "ok"
    pid = chat_template._program._process._popen.pid
    context = multiprocessing.get_context(method)
    answers = context.Queue()
    workers = [context.Process(target=render_in_worker, args=(chat_template, answers)) for _ in range(2)]
    for worker in workers:
        worker.start()
    got = [answers.get(timeout=60) for _ in workers]
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    assert [text for text, _ in got] == ["ok", "ok"]
    assert len({pid, *(other for _, other in got)}) == 3
    assert chat_template.render(HARMLESS, False) == "ok"
    assert chat_template._program._process._popen.pid == pid


def test_pickled_templates_render_alike():
    chat_template = template("{{ bos_token }}{{ a }}{{ b }}", a=1).with_kwargs({"b": [2]})
    other = pickle.loads(pickle.dumps(chat_template))
    assert other.render([], False) == chat_template.render([], False) == "<s>1[2]"
    assert (other.text, other.name, other.kwargs) == (chat_template.text, chat_template.name, chat_template.kwargs)


def test_ours_are_rendered_here_and_others_are_not():
    ours = ChatTemplate("exported", (BUILTINS / "qwen3.jinja").read_text(), {}, {"enable_thinking": True})
    assert not isinstance(ours._program, SandboxedProgram)
    assert isinstance(template("x")._program, SandboxedProgram)
    edited = ChatTemplate("edited", (BUILTINS / "qwen3.jinja").read_text() + " ", {}, {})
    assert isinstance(edited._program, SandboxedProgram)


def test_any_text_comes_through_unchanged():
    odd = "\x00 \ud800 \U0010ffff   \r\n \ue000 {{ x }}"
    big = {"n": 10**30, "x": 1e400, "z": -0.0, "k": None}
    chat_template = template("{{ messages[0].content }}{{ tools[0] | tojson }}")
    text = chat_template.render((Message("user", odd),), False, [big])
    assert text == odd + '{"n": 1000000000000000000000000000000, "x": Infinity, "z": -0.0, "k": null}'
