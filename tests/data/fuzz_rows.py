"""Mutated rows through reading, parsing, rendering and fitting: whatever is raised is a DataError, and none takes over
a second.

    python tests/data/fuzz_rows.py --rows 1000000 --seed 0

Real rows are taken from the folder that SFT_JAX_ASSETS names, where it is set, and from the examples below. Rows go in
files of a few hundred, as JSON lines or as an array, so that what a broken row does to its neighbours is seen as well.
"""

import argparse
import dataclasses
import itertools
import json
import os
import random
import re
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tiny_tokenizers import write_byte_level, write_sentencepiece

from sft_jax.config import _CHOICES, _SOURCE_FORMATS
from sft_jax.config_schema import DataConfig
from sft_jax.data.conversations import ignored_fields, parse_row
from sft_jax.data.errors import RowError
from sft_jax.data.rendering import open_renderer
from sft_jax.data.sources import BadRow, read_rows
from sft_jax.data.too_long import fit_examples
from sft_jax.datatypes import Conversation, DataError, Document, RawRow

ROWS_PER_FILE = 200
ROWS_PER_ARRAY = 10
"""Few: brackets that do not pair make the rest of an array unreadable."""
MAX_SECONDS = 1.0
CHARACTERS_PER_SECOND = 200_000
MAX_SEQ_LEN = 256
"""Short: many rows are over-long."""
_MAX_REAL_ROW_BYTES = 5000

Render = Callable[[Conversation | Document], object]

EXAMPLES: list[dict[str, Any]] = [
    {
        "messages": [
            {"role": "system", "content": "s"},
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Yo"},
        ]
    },
    {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "What is 1 + 1?"}]},
            {
                "role": "assistant",
                "content": None,
                "reasoning_content": "add",
                "tool_calls": [{"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}],
            },
            {"role": "tool", "tool_call_id": "1", "name": "add", "content": "2"},
            {"role": "assistant", "content": "<think>so</think>2", "weight": 0.5},
        ],
        "tools": [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "default": None}}}],
    },
    {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yo"}], "system": "s", "tools": "[]"},
    {"instruction": "Add", "input": "1 1", "output": "2", "system": "", "history": [["a", "b"]]},
    {"prompt": "Hi", "completion": "Yo"},
    {"prompt": [{"role": "user", "content": "Hi"}], "completion": [{"role": "assistant", "content": "Yo"}]},
    {"text": "Once upon a time"},
]
_KEYS = sorted(
    {"messages", "role", "content", "from", "value", "conversations", "tools", "tool_calls", "function", "name"}
    | {"arguments", "id", "tool_call_id", "weight", "train", "text", "prompt", "completion", "instruction"}
    | {"input", "output", "history", "system", "reasoning_content", "type", "", "Role", "role ", "__class__"}
)
_STRINGS = [
    "",
    " ",
    "user",
    "assistant",
    "system",
    "tool",
    "human",
    "gpt",
    "function_call",
    "observation",
    "bot",
    "\0",
    "\u2028",
    "\ufeff",
    "\U0001f600",
    "\u202e",
    "\ue000",
    "<|im_end|>",
    "</s>",
    "[INST]",
    "<think>",
    "{{",
    "{%",
    "[",
    "{}",
    '{"a":1,"a":2}',
    '{"a":NaN}',
    "{" * 500,
    "e\u0301" * 50,
    "a" * 20_000,
]
_NUMBERS = [0, -0.0, 1, -1, 0.5, 2, 1e308, 5e-324, 2**63, 2**64, -(10**40), 1e22]
_TOKENS = [
    b'"',
    b"\\",
    b"{",
    b"}",
    b"[",
    b"]",
    b",",
    b":",
    b"\n",
    b"\r",
    b"\0",
    b"\t",
    b"\xef\xbb\xbf",
    b"\xff",
    b"\xed\xa0\x80",
    b"\xe2\x80\xa8",
    b"\\ud800",
    b"\\udc00",
    b"\\u0000",
    b"NaN",
    b"-Infinity",
    b"1e400",
    b"1" * 5000,
    b"null",
    b"true",
    b"{}",
    b"[]",
    b'"role":',
    b'"content":"x",',
    b"//",
    b"'",
    b" ",
    b"<|im_end|>",
]


class Mutator:
    """Gives texts of rows: each is an example or a real row, after changes of its values and then of its bytes."""

    def __init__(self) -> None:
        self._real_rows = _read_real_rows() or EXAMPLES

    def __call__(self, random: random.Random) -> bytes:
        row, other = (random.choice(random.choice([EXAMPLES, self._real_rows])) for _ in range(2))
        if random.random() < 0.6:
            row = _copy(row)
            for _ in range(random.randint(1, 3)):
                _change_value(row, other, random)
        text = json.dumps(row, ensure_ascii=random.random() < 0.5).encode()
        if random.random() < 0.5:
            other_text = json.dumps(other).encode()
            for _ in range(random.choice([1, 1, 1, 2, 5, 20])):
                text = _change_bytes(text, other_text, random)
        return text


def _change_value(row: dict[str, Any], other: dict[str, Any], random: random.Random) -> None:
    """Change one place in the row: its type, its value, its key; or drop, repeat or wrap it."""
    places = [(container, key) for container in _containers(row) for key in _keys(container)]
    if not places:
        row[random.choice(_KEYS)] = _any_value(other, random)
        return
    container, key = random.choice(places)
    match random.randrange(7):
        case 0:
            container[key] = _any_value(other, random)
        case 1:
            del container[key]
        case 2 if isinstance(container, dict):
            container[random.choice(_KEYS)] = container.pop(key)
        case 2 | 3 if isinstance(container, list):
            container.insert(random.randint(0, len(container)), _copy(container[key]))
        case 3:
            container[random.choice(_KEYS)] = _copy(container[key])
        case 4:
            container[key] = random.choice([[container[key]], {"text": container[key]}, json.dumps(container[key])])
        case 5:
            for _ in range(random.choice([1, 50, 98, 99, 100, 101, 300])):
                container[key] = [container[key]] if random.random() < 0.5 else {"a": container[key]}
        case _:
            container[key] = random.choice(_STRINGS)


def _any_value(other: dict[str, Any], random: random.Random) -> Any:
    return random.choice(
        [None, True, False, [], {}, [None], random.choice(_NUMBERS), random.choice(_STRINGS), _copy(other)]
        + [_copy(value) for value in other.values()]
    )


def _copy(value: Any) -> Any:
    """Deeper than `copy.deepcopy` goes: three changes may have made 900 levels."""
    return json.loads(json.dumps(value))


def _containers(value: Any) -> Iterator[Any]:
    waiting = [value]
    while waiting:
        container = waiting.pop()
        if isinstance(container, dict | list):
            yield container
            waiting += container.values() if isinstance(container, dict) else container


def _keys(container: Any) -> list[Any]:
    return list(container) if isinstance(container, dict) else list(range(len(container)))


def _change_bytes(text: bytes, other: bytes, random: random.Random) -> bytes:
    start = random.randint(0, len(text))
    end = min(len(text), start + random.choice([0, 1, 1, 2, 10, 100]))
    match random.randrange(9):
        case 0:
            return text[:start] + bytes([random.randrange(256)]) + text[start + 1 :]
        case 1:
            return text[:start] + text[end:]
        case 2:
            return text[:end] + text[start:]
        case 3 | 4:
            return text[:start] + random.choice(_TOKENS) + text[end:]
        case 5:
            return text[:start] + other[random.randint(0, len(other)) :]
        case 6:
            start = text.find(b"{", start) + 1
            key = random.choice([b'"role"', b'"\\u0072ole" ', b'"text"\t', b'"a\\\\"', b'":"', b'""'])
            return text[:start] + key + b":" + random.choice([b"1", b'"x:\\":"', b"{}"]) + b"," + text[start:]
        case 7:
            return (
                text[:start]
                + random.choice([b"[", b'{"a":', b'"\\', b"[1,", b'{"":"","":']) * random.choice([3, 60, 2000])
                + text[start:]
            )
        case _:
            # Rarely: a million levels are a megabyte.
            deep = 10**6 if random.random() < 1e-3 else 120
            return text[:start] + b"[" * deep + text[start:end] + b"]" * random.choice([0, deep, deep - 1]) + text[end:]


@dataclass
class Account:
    """What became of the rows, by verdict."""

    verdicts: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    """What must not happen, with the text of the file in which it did."""
    slowest: dict[str, tuple[float, str]] = field(default_factory=dict)
    """The most CPU time that one row took to read and to parse under every format, and to render with each template;
    and the row, or as much of it as can be shown."""

    def add_time(self, stage: str, seconds: float, row: object) -> None:
        """Reading may take a second; rendering may for each `CHARACTERS_PER_SECOND` of the row: a million characters
        are a million tokens to a small tokenizer, each of them encoded as often as a policy renders it."""
        if seconds > self.slowest.get(stage, (0.0, ""))[0]:
            self.slowest[stage] = seconds, f"{row!r:.300}"
        if seconds > MAX_SECONDS and (
            stage == "reading" or seconds > MAX_SECONDS * len(repr(row)) / CHARACTERS_PER_SECOND
        ):
            self.failures.append(f"{stage} took {seconds:.2f} s for {row!r:.20000}")


def open_renders(folder: Path) -> dict[str, Render]:
    """For each template: renders a row, and fits it by each policy in turn."""
    byte_level, sentencepiece = write_byte_level(folder / "byte_level"), write_sentencepiece(folder / "sentencepiece")
    llama_tokens = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>")
    data = {
        # One takes text alone; one takes tools and reasoning, and rewrites history; one writes tools in its own way.
        "chatml": DataConfig(tokenizer=str(byte_level)),
        "qwen3": DataConfig(tokenizer=str(byte_level), new_tokens=("<tool_call>", "</tool_call>")),
        "llama3.1": DataConfig(tokenizer=str(sentencepiece), new_tokens=llama_tokens),
    }
    return {name: _open_render(dataclasses.replace(of_name, chat_template=name)) for name, of_name in data.items()}


def _open_render(data: DataConfig) -> Render:
    renderer = open_renderer(data, "")
    policies = itertools.cycle(_CHOICES["data.too_long"])

    def render(row: Conversation | Document) -> None:
        for example in fit_examples(row, renderer, MAX_SEQ_LEN, next(policies)).examples:
            assert 0 < len(example) <= MAX_SEQ_LEN
            assert example.loss_weights.any()

    return render


def main(num_rows: int, seed: int, renders: Mapping[str, Render] | None = None, max_failures: int = 5) -> Account:
    """Mutate, read and parse so many rows.

    Args:
      renders: each is given every row that parses, and may raise nothing but a DataError either.
      max_failures: stop after so many.
    """
    chosen, account = random.Random(seed), Account()
    mutate = Mutator()
    num_mutated = 0
    with tempfile.TemporaryDirectory() as folder:
        while num_mutated < num_rows and len(account.failures) < max_failures:
            is_array = chosen.random() < 0.5
            num_texts = min(ROWS_PER_ARRAY if is_array else ROWS_PER_FILE, num_rows - num_mutated)
            texts = [mutate(chosen) for _ in range(num_texts)]
            num_mutated += num_texts
            path = Path(folder) / f"rows.{'json' if is_array else 'jsonl'}"
            path.write_bytes(b"[" + b",\n".join(texts) + b"]" if is_array else b"\n".join(texts))
            _read_file(path, renders or {}, account)
    return account


def _read_real_rows() -> list[dict[str, Any]]:
    folder = os.environ.get("SFT_JAX_ASSETS")
    if not folder:
        return []
    paths = sorted(path for ending in ("json", "jsonl") for path in (Path(folder) / "sft").rglob(f"*.{ending}"))
    found = []
    for path in paths:
        rows = [row.fields for row in read_rows(str(path)) if isinstance(row, RawRow)][:40]
        found += [row for row in rows if len(json.dumps(row)) < _MAX_REAL_ROW_BYTES]
    return found


def _read_file(path: Path, renders: Mapping[str, Render], account: Account) -> None:
    rows = read_rows(str(path))
    num_lines = path.read_bytes().count(b"\n") + 1
    while True:
        row, stage, start = None, "reading", time.process_time()
        try:
            row = next(rows, None)
            if row is None:
                return
            assert row.origin.path == str(path)
            assert 1 <= row.origin.line <= num_lines
            if isinstance(row, BadRow):
                account.verdicts[f"reading: {row.reason}"] += 1
                _check_message(f"{row.origin}: {row.message}")
                continue
            verdicts = {format: _verdict(row, _parse, row, format) for format in _SOURCE_FORMATS}
            if verdicts["auto"] == "accepted":
                parsed = parse_row(row, "auto")
                for name, render in renders.items():
                    account.add_time(stage, time.process_time() - start, row)
                    stage, start = name, time.process_time()
                    verdicts[name] = _verdict(row, render, parsed)
            account.verdicts.update(f"{by}: {verdict}" for by, verdict in verdicts.items())
        except DataError as error:  # of the file: its rows cannot be told apart
            account.verdicts["reading: the rest of the file"] += 1
            _check_message(str(error))
            return
        except Exception:
            account.failures.append(f"{traceback.format_exc()}\nin {path.read_bytes()!r:.20000}")
            return
        finally:
            account.add_time(stage, time.process_time() - start, row)


def _parse(row: RawRow, format: str) -> None:
    parse_row(row, format)
    if format != "auto":
        ignored_fields(row, format)


def _verdict(row: RawRow, take: Callable[..., object], *args: Any) -> str:
    """The reason for which `take(*args)` refuses the row, or `accepted`."""
    try:
        take(*args)
    except RowError as error:
        _check_message(str(error), f"{row.origin}: ")
        return error.reason
    except DataError as error:
        _check_message(str(error))
        return "refused"
    return "accepted"


def _check_message(message: str, start: str = "") -> None:
    """It can be written, is one line, and does not hold a row."""
    assert message.startswith(start), "a message is not of its row"
    message.encode()
    assert not re.search(r"[\x00-\x1f\u2028]", message), "a message is more than a line"
    assert len(message) < 1500, "a message is as long as a row"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as tokenizer_folder:
        started = time.monotonic()
        result = main(args.rows, args.seed, open_renders(Path(tokenizer_folder)))
    for verdict, count in sorted(result.verdicts.items()):
        print(f"{count:10,} {verdict}")
    print(f"{args.rows:,} rows in {time.monotonic() - started:.0f} s; {len(result.failures)} failures")
    for stage, (seconds, row) in result.slowest.items():
        print(f"{stage}: at most {seconds:.3f} s, for {row}")
    print("\n\n".join(result.failures))
    sys.exit(bool(result.failures))
