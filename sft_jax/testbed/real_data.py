"""Real demonstrations as published in, {"id", "messages"} rows out, split into training and held-out files.

    python -m sft_jax.testbed.real_data --assets=DIR --to=build/tinystories

    sft/oasst          a conversation tree -> for each first answer, the turns along the best-ranked replies
    sft/self-instruct  a task -> one conversation for each of its instances: instruction and input, then output

A row's side of the split follows from a hash of its tree or task alone: it never moves when others come or go, and no
prompt is on both sides.
"""

import argparse
import hashlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sft_jax.command_line import run_command
from sft_jax.data.sources import read_rows
from sft_jax.datatypes import DataError, Message, RawRow
from sft_jax.testbed.make import as_json, write_rows

TINYSTORIES_DIR = "build/tinystories"
HELD_OUT_FRACTION = 1 / 6
_OASST_ROLES = {"prompter": "user", "assistant": "assistant"}
_SOURCES = {
    "oasst": ("sft/oasst/en_100_tree.jsonl",),
    "self_instruct": ("sft/self-instruct/seed_tasks.jsonl", "sft/self-instruct/user_oriented_instructions.jsonl"),
}

Row = tuple[str, tuple[Message, ...]]
"""(id, messages); the id is `<tree or task>/<number>`."""


def read_oasst(path: str) -> Iterator[Row]:
    """One conversation for each first answer of an Open Assistant tree, so that no answer stands in two of them.

    Each goes on with the reply of the lowest rank, an unranked one only where there is no other; a last turn that
    nothing answers is left out. (The best first answers alone would leave configs/tinystories.py 22 rows of 100: the
    others are too long, or cannot be said in its vocabulary.)
    """
    for row in _read(path):
        prompt = row.fields["prompt"]
        for number, answer in enumerate(sorted(prompt["replies"], key=_rank)):
            turns, node = [prompt], answer
            while node is not None:
                turns.append(node)
                node = min(node["replies"], key=_rank, default=None)
            if len(turns) % 2:
                turns.pop()
            messages = tuple(Message(_OASST_ROLES[turn["role"]], turn["text"]) for turn in turns)
            yield f"{row.fields['message_tree_id']}/{number}", messages


def _rank(reply: dict[str, Any]) -> float:
    rank = reply.get("rank")
    return float("inf") if rank is None else float(rank)


def read_self_instruct(path: str) -> Iterator[Row]:
    """One conversation per instance of a task; an input stands below the instruction after a blank line."""
    for row in _read(path):
        for number, instance in enumerate(row.fields["instances"]):
            prompt = "\n\n".join(filter(None, [row.fields["instruction"], instance["input"]]))
            yield f"{row.fields['id']}/{number}", (Message("user", prompt), Message("assistant", instance["output"]))


def _read(path: str) -> Iterator[RawRow]:
    for row in read_rows(path):
        if not isinstance(row, RawRow):
            raise DataError(f"{row.origin}: {row.message}")
        yield row


def is_held_out(row_id: str) -> bool:
    """Decided by the tree or task alone, the same on every machine and in every release."""
    digest = hashlib.sha256(row_id.split("/")[0].encode()).digest()
    return int.from_bytes(digest[:4], "big") < HELD_OUT_FRACTION * 2**32


def convert(assets: Path, folder: Path) -> dict[str, int]:
    """Write `<source>_train.jsonl` and `<source>_held_out.jsonl` of each source.

    Returns:
      Rows in each file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    counts = {}
    for source, paths in _SOURCES.items():
        read = read_oasst if source == "oasst" else read_self_instruct
        rows = [row for path in paths for row in read(str(assets / path))]
        for split, held_out in (("train", False), ("held_out", True)):
            chosen = [row for row in rows if is_held_out(row[0]) == held_out]
            name = f"{source}_{split}.jsonl"
            write_rows(folder / name, ({"id": row_id, "messages": as_json(messages)} for row_id, messages in chosen))
            counts[name] = len(chosen)
    return counts


def main(args: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m sft_jax.testbed.real_data",
        description="Convert the real demonstrations that configs/tinystories.py trains on.",
        epilog=f"example: python -m sft_jax.testbed.real_data --assets=$SFT_JAX_ASSETS --to={TINYSTORIES_DIR}",
        allow_abbrev=False,
    )
    parser.add_argument("--assets", required=True, metavar="DIR", help="folder with sft/oasst and sft/self-instruct")
    parser.add_argument("--to", default=TINYSTORIES_DIR, metavar="DIR", help=f"default: {TINYSTORIES_DIR}")
    options = parser.parse_args(args)
    for name, count in convert(Path(options.assets), Path(options.to)).items():
        print(f"{count:>6} rows  {Path(options.to) / name}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
