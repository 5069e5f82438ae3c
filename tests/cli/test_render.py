"""render says of each row of a file what it becomes, or why it is refused, and goes on."""

import dataclasses
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from sft_jax.cli.main import dispatch
from sft_jax.command_line import run_command
from sft_jax.data.rendering import Renderer
from sft_jax.data.tokenizer import load_tokenizer
from sft_jax.testbed.make import BASE_MODEL

CHATML = [f"--tokenizer={BASE_MODEL}", "--template=chatml", "--new-tokens=<|im_start|>,<|im_end|>"]
# History stands without its roles, so no turn can share an example with the next.
FORGETFUL = """{% for message in messages %}{% if message.role == 'user' or loop.last %}<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% else %}{{ message.content }}
{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def chat(*contents):
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]
    return {"messages": messages}


@pytest.fixture(autouse=True)
def _in_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def render(capsys, rows, *args, status=0):
    with open("rows.jsonl", "w") as out:
        out.write("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    assert run_command(dispatch, ["render", "--input=rows.jsonl", *args]) == status
    return capsys.readouterr().out


def objects(*args, **kwargs):
    return [json.loads(line) for line in render(*args, "--json", **kwargs).splitlines()]


def test_a_row_is_its_ids_weights_and_text(capsys):
    (row,) = objects(capsys, [chat("Where was Kulo born?", "In Ashmoor.")], *CHATML)
    assert set(row) == {"origin", "ids", "loss_weights", "text"}
    assert row["origin"] == "rows.jsonl:1"
    assert row["text"] == (
        "<|im_start|>user\nWhere was Kulo born?<|im_end|>\n<|im_start|>assistant\nIn Ashmoor.<|im_end|>\n"
    )
    trained = [token for token, weight in zip(row["ids"], row["loss_weights"], strict=True) if weight]
    tokenizer = load_tokenizer(BASE_MODEL, ("<|im_start|>", "<|im_end|>"))
    assert tokenizer.decode(trained, continuation=True) == "In Ashmoor.<|im_end|>"


def test_a_row_of_several_examples_lists_them(capsys):
    with open("forgetful.jinja", "w") as out:
        out.write(FORGETFUL)
    args = [*CHATML, "--template=forgetful.jinja"]
    one, several = objects(capsys, [chat("Hi", "Yes."), chat("Hi", "Yes.", "And?", "No.")], *args)
    assert set(several) == {"origin", "examples"}
    assert several["examples"][0] == {name: one[name] for name in ("ids", "loss_weights", "text")}
    assert [("Yes." in e["text"], "No." in e["text"]) for e in several["examples"]] == [(True, False), (True, True)]


def test_refused_rows_are_named_and_the_others_rendered(capsys):
    rows = [chat("Hi", "Yes."), "{broken", chat("Hi"), chat("Hi", "No.")]
    good, broken, unanswered, last = objects(capsys, rows, *CHATML, status=3)
    assert good.keys() == last.keys()
    assert (broken["origin"], broken["refused"]) == ("rows.jsonl:2", "malformed_json")
    assert unanswered["refused"] == "no_assistant_turn"
    assert unanswered["message"].startswith("has no assistant turn to train on. ")
    text = render(capsys, rows, *CHATML, status=3)
    assert "rows.jsonl:3  refused: no_assistant_turn: has no assistant turn to train on. " in text
    assert "No.<|im_end|>" in text


def test_the_first_format_is_held_against_every_row(capsys):
    rows = [{"text": "Kulo"}, chat("Hi", "Yes.")]
    assert objects(capsys, rows, *CHATML, status=3)[1]["refused"] == "wrong_format"
    assert objects(capsys, rows, *CHATML, "--format=messages", status=3)[0]["refused"] == "wrong_format"


def test_a_row_that_may_be_read_in_two_ways_is_refused_wherever_it_stands(capsys):
    plain, two_ways = chat("Hi", "Yes."), chat("Hi", "Yes.") | {"prompt": "Hi", "completion": "No."}
    for rows in ([two_ways, plain], [plain, two_ways]):
        found = objects(capsys, rows, *CHATML, status=3)
        assert [result.get("refused") for result in found] == ["wrong_format" if r is two_ways else None for r in rows]
    assert "ids" in objects(capsys, [two_ways], *CHATML, "--format=messages")[0]


def test_a_row_with_nothing_to_train_on_is_refused_as_a_run_would(capsys, monkeypatch):
    def render(renderer, row):
        return [dataclasses.replace(one, loss_weights=one.loss_weights * 0) for one in original(renderer, row)]

    original = Renderer.render
    monkeypatch.setattr(Renderer, "render", render)
    assert objects(capsys, [chat("Hi", "Yes.")], *CHATML, status=3)[0]["refused"] == "nothing_supervised"


def test_template_kwargs_and_stop_token_reach_the_template(capsys):
    with open("greeting.jinja", "w") as out:
        out.write("{{ greeting }}" + FORGETFUL)
    args = [*CHATML, "--template=greeting.jinja", '--template-kwargs={"greeting": "Hello!"}']
    (row,) = objects(capsys, [chat("Hi", "Yes.")], *args)
    assert row["text"].startswith("Hello!<|im_start|>user\n")
    assert "config.data.stop_token" in run_error(capsys, [*CHATML, "--stop-token=<none>"])


def test_roles_are_mapped(capsys):
    row = {"messages": [{"role": "kid", "content": "Hi"}, {"role": "sage", "content": "Yes."}]}
    assert objects(capsys, [row], *CHATML, status=3)[0]["refused"] == "unknown_role"
    (mapped,) = objects(capsys, [row], *CHATML, '--role-map={"kid": "user", "sage": "assistant"}')
    (plain,) = objects(capsys, [chat("Hi", "Yes.")], *CHATML)
    assert mapped == plain
    assert "config.data.role_map" in run_error(capsys, [*CHATML, '--role-map={"kid": "king"}'])


@pytest.mark.parametrize("condition", ["true", "messages[0].content == 'Hi'"])
def test_a_template_that_writes_todays_date_is_refused_as_check_does(capsys, condition):
    with open("dated.jinja", "w") as out:
        out.write(f"{{% if {condition} %}}{{{{ strftime_now('%d %b %Y') }}}}{{% endif %}}{FORGETFUL}")
    args = [*CHATML, "--template=dated.jinja"]
    error = run_error(capsys, args)
    assert "dated.jinja writes today's date into every prompt" in error
    assert "dict(now='2026-01-31')" in error
    (row,) = objects(capsys, [chat("Hi", "Yes.")], *args, '--template-kwargs={"now": "2026-01-31"}')
    assert row["text"].startswith("31 Jan 2026<|im_start|>user\n")


@pytest.mark.parametrize("rows", [[], ["", " "]])
def test_a_file_without_rows_is_an_error(capsys, rows):
    with open("none.jsonl", "w") as out:
        out.write("\n".join(rows))
    for args in (CHATML, [*CHATML, "--json"]):
        error = run_error(capsys, [*args, "--input=none.jsonl"], status=3)
        assert "--input: none.jsonl has no rows. Name a file with at least one." in error


def run_error(capsys, args, status=2):
    with open("rows.jsonl", "w") as out:
        out.write(json.dumps(chat("Hi", "Yes.")) + "\n")
    assert run_command(dispatch, ["render", "--input=rows.jsonl", *args]) == status
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    return error


def test_what_is_no_tokenizer_template_or_file(capsys):
    assert "nowhere" in run_error(capsys, ["--tokenizer=nowhere"])
    assert "nowhere.jinja" in run_error(capsys, [*CHATML, "--template=nowhere.jinja"])
    assert "has no chat template" in run_error(capsys, [CHATML[0]])
    assert "none.jsonl" in run_error(capsys, [*CHATML, "--input=none.jsonl"], status=3)
    for kwargs in ("{", "[1]"):
        assert "kwargs" in run_error(capsys, [*CHATML, f"--template-kwargs={kwargs}"])
    assert "is 'csv'; expected auto, messages" in run_error(capsys, [*CHATML, "--format=csv"])


def test_a_reader_that_has_had_enough_ends_it_without_a_traceback():
    row = json.dumps(chat("Hi", "Ho " * 2000)) + "\n"
    Path("rows.jsonl").write_text(row * 20)
    command = [sys.executable, "-m", "sft_jax.cli.main", "render", "--input=rows.jsonl", "--json", *CHATML]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 128 + signal.SIGPIPE


def test_it_starts_without_jax():
    code = "import sys; import sft_jax.cli.render; assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
