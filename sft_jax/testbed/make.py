"""One command -> every file of the testbed, the same bytes on every machine.

python -m sft_jax.testbed.make --to=build/testbed

documents.jsonl       {"text"}      prose about everyone: what the base model is pretrained on
demonstrations.jsonl  {"messages"}  about the taught half: what it is fine-tuned on
held_out.jsonl        {"messages"}  about the held-out half: for the held-out loss
questions.jsonl       {"messages", "format", "answer", "person"}  the same without the last answers, to be asked
tokenizer/            a sentencepiece model trained on the documents
"""

import argparse
import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sft_jax.command_line import run_command
from sft_jax.datatypes import Message
from sft_jax.testbed.conversations import write_demonstrations, write_held_out, write_questions
from sft_jax.testbed.vocabulary import save_tokenizer, train_tokenizer
from sft_jax.testbed.world import make_world, write_documents

TESTBED_DIR = "build/testbed"
BASE_MODEL = str(Path(__file__).parent / "base_model")
"""The committed model, pretrained by configs/testbed_base.py on the documents alone."""


def make_testbed(folder: Path) -> None:
    """Write the folder above."""
    folder.mkdir(parents=True, exist_ok=True)
    world = make_world()
    documents = list(write_documents(world))
    write_rows(folder / "documents.jsonl", ({"text": text} for text in documents))
    for name, conversations in (("demonstrations", write_demonstrations(world)), ("held_out", write_held_out(world))):
        write_rows(folder / f"{name}.jsonl", ({"messages": as_json(messages)} for messages in conversations))
    write_rows(
        folder / "questions.jsonl",
        (
            {"messages": as_json(q.messages), "format": q.format, "answer": q.answer, "person": q.person}
            for q in write_questions(world)
        ),
    )
    save_tokenizer(train_tokenizer(documents), folder / "tokenizer")


def as_json(messages: Iterable[Message]) -> list[dict[str, str]]:
    """The value of a row's "messages"."""
    return [{"role": message.role, "content": message.content} for message in messages]


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write JSON lines; the file appears under its name only when it is whole."""
    unfinished = path.with_suffix(".unfinished")
    with unfinished.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    os.replace(unfinished, path)


def main(args: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m sft_jax.testbed.make",
        description="Write the documents, demonstrations, questions and tokenizer of the testbed.",
        epilog=f"example: python -m sft_jax.testbed.make --to={TESTBED_DIR}",
        allow_abbrev=False,
    )
    parser.add_argument("--to", default=TESTBED_DIR, metavar="DIR", help=f"default: {TESTBED_DIR}")
    folder = Path(parser.parse_args(args).to)
    make_testbed(folder)
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            print(f"{path.stat().st_size:>10,} bytes  {path}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
