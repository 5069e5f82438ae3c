"""Answers before and after fine-tuning -> what the demo shows: a table, and conversations side by side."""

import re
from collections.abc import Sequence

from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from sft_jax.testbed.conversations import FORMATS
from sft_jax.testbed.evaluation import Answered, score_answers

_SHOWN_CHARS = 220
_ROWS = (
    ("exact answers", "held_out_exact", "all facts right, no other"),
    ("stops by itself", "stop_rate", "ends its turn"),
    ("format obeyed", "format_obeyed", "as the prompt asked"),
)


def print_report(console: Console, before: Sequence[Answered], after: Sequence[Answered]) -> None:
    """The table, and one conversation of each format.

    Args:
      before, after: the same questions in the same order.
    """
    console.print()
    console.print(_scores_table(before, after))
    console.print()
    for index in choose_samples(after):
        console.print(_conversation(before[index], after[index]))


def choose_samples(answered: Sequence[Answered]) -> list[int]:
    """Of each format, the question with the longest right answer among its first ten: never chosen by the outcome."""
    indices_of = {format: [i for i, one in enumerate(answered) if one.question.format == format] for format in FORMATS}
    return [
        max(indices[:10], key=lambda i: len(answered[i].question.answer)) for indices in indices_of.values() if indices
    ]


def _scores_table(before: Sequence[Answered], after: Sequence[Answered]) -> Table:
    people = len({one.question.person for one in after})
    scores = (score_answers(before), score_answers(after))
    table = Table(
        title=f"{len(after)} questions about {people} people whom no demonstration names",
        title_style="bold",
        border_style="dim",
        padding=(0, 2),
    )
    table.add_column("")
    table.add_column("before", justify="right", style="yellow")
    table.add_column("after", justify="right", style="bold green")
    table.add_column("", style="dim")
    for name, field, meaning in _ROWS:
        table.add_row(name, *(f"{getattr(score, field):.1%}" for score in scores), meaning)
        if field == "held_out_exact":
            _add_formats(table, before, after)
    return table


def _add_formats(table: Table, before: Sequence[Answered], after: Sequence[Answered]) -> None:
    for format in FORMATS:
        parts = [[one for one in answers if one.question.format == format] for answers in (before, after)]
        if parts[0]:
            exact = (f"{score_answers(part).held_out_exact:.1%}" for part in parts)
            table.add_row(f"  of {format}s", *exact, f"{len(parts[0])} questions", style="dim")


def _conversation(before: Answered, after: Answered) -> Panel:
    turns = [
        Text.assemble((f"{message.role:>9}  ", "bold cyan"), message.content.replace("\n", "\n" + " " * 11))
        for message in after.question.messages
    ]
    replies = Table.grid(expand=True, padding=(1, 2, 0, 0))
    replies.add_column(ratio=1)
    replies.add_column(ratio=1)
    replies.add_row(_reply("before", before, "yellow"), _reply("after", after, "green"))
    parts: list[RenderableType] = [*turns, replies]
    if not after.exact:
        parts.append(Text(f"expected: {after.question.answer}", style="dim"))
    return Panel(Group(*parts), border_style="dim", padding=(0, 1))


def _reply(title: str, answered: Answered, style: str) -> RenderableType:
    shown = re.sub(r"(</s>)+", " </s> ", answered.reply)[:_SHOWN_CHARS].rstrip()  # documents end so; a turn does not
    end = ("  ■ stop" if answered.stopped else " ... never stops", "dim")
    verdict = "exact" if answered.exact else "not the answer"
    return Text.assemble((f"{title}", f"bold {style}"), (f"  {verdict}\n", "dim"), (shown, style), end)
