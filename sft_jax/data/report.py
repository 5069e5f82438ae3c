"""What became of every row: the account of a source, the limit on its bad rows, and how both are shown.

    rows_read = rows_trained + bad rows + dropped rows

*Bad* rows are those that nobody chose to lose (malformed, or over a limit whose policy is `error`); they stop the run
above `config.data.max_bad_fraction`. *Dropped* rows were given up by a policy that says `drop`.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from rich.markup import escape
from rich.table import Table

from sft_jax.data.errors import RowError
from sft_jax.data.too_long import Lost
from sft_jax.datatypes import DataError, TokenizedExample

NUM_SHOWN = 5
"""So many rows of each reason are kept by line and message; the others are counted."""


@dataclass
class LostRows:
    """The rows that went under one reason."""

    count: int = 0
    lines: list[int] = field(default_factory=list)
    """The first NUM_SHOWN line numbers."""
    messages: list[str] = field(default_factory=list)
    """What was wrong with each of those and what to do, without `file:line`."""

    def add(self, error: RowError) -> None:
        self.count += 1
        if self.count <= NUM_SHOWN:
            self.lines.append(error.origin.line)
            self.messages.append(str(error).removeprefix(f"{error.origin}: "))


@dataclass
class Account:
    """Where the rows of one source went, and what the trained ones came to."""

    rows_read: int = 0
    rows_trained: int = 0
    bad: dict[str, LostRows] = field(default_factory=dict)
    dropped: dict[str, LostRows] = field(default_factory=dict)
    examples: int = 0
    tokens: int = 0
    """Positions at which something is predicted."""
    supervised_tokens: int = 0
    """Those with a weight other than 0."""
    rows_shortened: int = 0
    """Trained rows that the policy for over-long rows changed."""
    turns_lost: int = 0
    """Supervised turns that over-long rows lost, those of rows that were lost as a whole included."""
    tokens_lost: int = 0
    supervised_tokens_lost: int = 0
    rendering: dict[str, int] = field(default_factory=dict)
    """What the renderer counted in the trained rows, by its names: see `Renderer.counts`."""
    ignored_fields: dict[str, int] = field(default_factory=dict)
    """Fields of rows that are not read, with the number of rows that have them."""

    def add_trained(
        self, examples: Sequence[TokenizedExample], rendering: Counter[str], ignored: Iterable[str]
    ) -> None:
        """Count a row that became `examples`; `rendering`: what the renderer counted, `ignored`: fields not read."""
        self.rows_trained += 1
        self.examples += len(examples)
        self.tokens += sum(len(example) for example in examples)
        self.supervised_tokens += sum(int(np.count_nonzero(example.loss_weights)) for example in examples)
        for total, counts in ((self.rendering, rendering), (self.ignored_fields, Counter(ignored))):
            for name, count in sorted(counts.items()):
                total[name] = total.get(name, 0) + count

    def add_lost(self, lost: Lost) -> None:
        """Count what an over-long row lost."""
        self.turns_lost += lost.turns
        self.tokens_lost += lost.tokens
        self.supervised_tokens_lost += lost.supervised_tokens

    @property
    def rows_bad(self) -> int:
        return sum(lost.count for lost in self.bad.values())

    @property
    def rows_dropped(self) -> int:
        return sum(lost.count for lost in self.dropped.values())


def check_account(account: Account, path: str, max_bad_fraction: float) -> None:
    """Refuse a source with too many bad rows, or with nothing left to train on.

    Raises:
      DataError: with each reason, its count, the first row of it and the lines of the next ones.
    """
    reasons = "\n".join(_explain(account.bad, path) + _explain(account.dropped, path))
    if not account.rows_read:
        raise DataError(f"{path}: has no rows. Name a file with at least one, or remove the source.")
    if account.rows_bad / account.rows_read > max_bad_fraction:
        raise DataError(
            f"{path}: {account.rows_bad:,} of {account.rows_read:,} rows are bad; config.data.max_bad_fraction allows "
            f"{max_bad_fraction:.4g} of them.\n{reasons}\n"
            "Mend the rows, or raise config.data.max_bad_fraction to have them dropped and counted."
        )
    if not account.rows_trained:
        raise DataError(f"{path}: none of its {account.rows_read:,} rows can be trained on.\n{reasons}")


def account_to_json(account: Account, path: str) -> dict[str, Any]:
    """The account as it stands in data_report.json: rows by `file:line`."""

    def lost_rows(by_reason: dict[str, LostRows]) -> dict[str, Any]:
        return {
            reason: {
                "count": lost.count,
                "first": [
                    {"origin": f"{path}:{line}", "message": message}
                    for line, message in zip(lost.lines, lost.messages, strict=True)
                ],
            }
            for reason, lost in by_reason.items()
        }

    return vars(account) | {
        "rows_bad": account.rows_bad,
        "rows_dropped": account.rows_dropped,
        "bad": lost_rows(account.bad),
        "dropped": lost_rows(account.dropped),
    }


def report_table(report: dict[str, Any]) -> Table:
    """A `PackedDataset.report` as a table: one line per source, and one per reason for which it lost rows."""
    table = Table(show_edge=False)
    table.add_column("source", no_wrap=True)
    for heading in ("rows", "trained", "lost", "tokens", "supervised"):
        table.add_column(heading, justify="right")
    table.add_column("first lost", overflow="fold")
    for name, source in report["sources"].items():
        numbers = [source[key] for key in ("rows_read", "rows_trained", "tokens", "supervised_tokens")]
        read, trained, tokens, supervised = (f"{number:,}" for number in numbers)
        num_lost = f"{source['rows_bad'] + source['rows_dropped']:,}"
        table.add_row(escape(name), read, trained, num_lost, tokens, supervised, "", style="bold")
        for kind in ("bad", "dropped"):
            for reason, lost in source[kind].items():
                first = escape(lost["first"][0]["origin"])
                table.add_row(f"  {kind}: {reason}", "", "", f"{lost['count']:,}", "", "", first)
        for ignored, count in source["ignored_fields"].items():
            table.add_row(escape(f"  field {ignored} is not read"), f"{count:,}", style="dim")
    return table


def _explain(by_reason: dict[str, LostRows], path: str) -> list[str]:
    """One paragraph per reason, the commonest first."""
    paragraphs = []
    for reason, lost in sorted(by_reason.items(), key=lambda item: -item[1].count):
        also = ", ".join(f"{path}:{line}" for line in lost.lines[1:])
        more = " ..." if lost.count > len(lost.lines) else ""
        paragraphs.append(f"  {lost.count:>6,} {reason}: {path}:{lost.lines[0]}: {lost.messages[0]}")
        if also:
            paragraphs.append(f"{'':9}also {also}{more}")
    return paragraphs
