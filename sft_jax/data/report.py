"""What became of every row: the account of a source, the limit on its bad rows, and how both are shown.

    rows_read = rows_trained + bad rows + dropped rows + rows_not_taken

*Bad* rows are those that nobody chose to lose (malformed, or over a limit whose policy is `error`); they stop the run
above `config.data.max_bad_fraction`. *Dropped* rows were given up by a policy that says `drop`. Rows *not taken* belong
to another split, or lie beyond `max_rows`.

Accounts of parts add up: those of the chunks of a file, merged in order, are the account of the file.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from sft_jax.data.errors import RowError
from sft_jax.data.source_files import NotRead
from sft_jax.data.too_long import FitResult, Lost
from sft_jax.datatypes import DataError, Origin

NUM_SHOWN = 5
"""So many rows of each reason are kept by origin and message; the others are counted."""


@dataclass
class LostRows:
    """The rows that went under one reason."""

    count: int = 0
    origins: list[Origin] = field(default_factory=list)
    """Of the first NUM_SHOWN."""
    messages: list[str] = field(default_factory=list)
    """What was wrong with each of those and what to do, without `file:line`."""

    def add(self, error: RowError) -> None:
        self.count += 1
        if self.count <= NUM_SHOWN:
            self.origins.append(error.origin)
            self.messages.append(str(error).removeprefix(f"{error.origin}: "))

    def merge(self, later: "LostRows") -> None:
        self.count += later.count
        self.origins = (self.origins + later.origins)[:NUM_SHOWN]
        self.messages = (self.messages + later.messages)[:NUM_SHOWN]


@dataclass
class Account:
    """Where the rows of one source went, and what the trained ones came to."""

    rows_read: int = 0
    rows_trained: int = 0
    rows_not_taken: int = 0
    bad: dict[str, LostRows] = field(default_factory=dict)
    dropped: dict[str, LostRows] = field(default_factory=dict)
    turns: int = 0
    """Supervised turns in the examples, each through its stop token: `turns_lost` are not among them."""
    examples: int = 0
    lengths: dict[int, int] = field(default_factory=dict)
    """Power of two -> the number of examples of that many tokens or fewer, and more than half as many."""
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
    """What the renderer counted in the trained rows, before any was shortened: see `RenderedRow`."""
    kept: dict[str, int] = field(default_factory=dict)
    """Turns that a policy `keep` let pass, by reason."""
    ignored_fields: dict[str, int] = field(default_factory=dict)
    """Fields of rows that are not read, with the number of rows that have them."""

    def add_trained(self, fit: FitResult, kept: Counter[str], ignored: Collection[str]) -> None:
        """Count a row; `kept`: turns let pass, `ignored`: fields not read."""
        self.rows_trained += 1
        self.turns += fit.turns
        self.supervised_tokens += fit.supervised_tokens
        self.examples += len(fit.examples)
        for example in fit.examples:
            length = len(example.inputs)
            self.tokens += length
            up_to = 1 << (length - 1).bit_length()
            self.lengths[up_to] = self.lengths.get(up_to, 0) + 1
        if fit.counts:
            _add_counts(self.rendering, fit.counts)
        if kept:
            _add_counts(self.kept, kept)
        if ignored:
            _add_counts(self.ignored_fields, dict.fromkeys(sorted(ignored), 1))
        if fit.is_changed:
            self.rows_shortened += 1
            self.add_lost(fit.lost)

    def merge(self, later: "Account") -> None:
        """Add the account of the rows that follow, as if one account had counted them all."""
        for f in fields(self):
            mine, other = getattr(self, f.name), getattr(later, f.name)
            if isinstance(mine, int):
                setattr(self, f.name, mine + other)
            elif f.name in ("bad", "dropped"):
                for reason, lost in other.items():
                    mine.setdefault(reason, LostRows()).merge(lost)
            else:
                _add_counts(mine, other)

    def check_balance(self) -> None:
        """Every row that was read is in one place. One that is not is our mistake, never the user's."""
        parts = (self.rows_trained, self.rows_bad, self.rows_dropped, self.rows_not_taken)
        assert self.rows_read == sum(parts), (
            f"{self.rows_read} rows read are not {' + '.join(map(str, parts))} trained, bad, dropped and not taken"
        )

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


def check_account(account: Account, path: str, max_bad_fraction: float, field: str) -> None:
    """Refuse a source with too many bad rows, or with nothing left to train on.

    Args:
      field: the config field of the source, such as `config.data.train[0]`.

    Raises:
      DataError: with each reason, its count, the first row of it and the places of the next ones.
    """
    account.check_balance()
    reasons = "\n".join(_explain(account.bad) + _explain(account.dropped))
    rows_taken = account.rows_read - account.rows_not_taken
    if not account.rows_read:
        raise DataError(f"{field}.path: {path} has no rows. Name a file with at least one, or remove the source.")
    if not rows_taken:
        raise DataError(
            f"{field}: none of the {account.rows_read:,} rows of {path} is taken. Take more by its split, "
            "held_out_fraction or max_rows, or remove the source."
        )
    if account.rows_bad / rows_taken > max_bad_fraction:
        raise DataError(
            f"{field}.path: {account.rows_bad:,} of {rows_taken:,} rows of {path} are bad; "
            f"config.data.max_bad_fraction allows {max_bad_fraction:.4g} of them.\n{reasons}\n"
            "Mend the rows, or raise config.data.max_bad_fraction to have them dropped and counted."
        )
    if not account.rows_trained:
        raise DataError(
            f"{field}.path: none of the {rows_taken:,} rows of {path} can be trained on.\n{reasons}\n"
            "Mend the rows, or remove the source."
        )


def account_to_json(account: Account) -> dict[str, Any]:
    """The account as it stands in data_report.json: rows by `file:line`."""
    account.check_balance()

    def lost_rows(by_reason: dict[str, LostRows]) -> dict[str, Any]:
        return {
            reason: {
                "count": lost.count,
                "first": [
                    {"origin": str(origin), "message": message}
                    for origin, message in zip(lost.origins, lost.messages, strict=True)
                ],
            }
            for reason, lost in by_reason.items()
        }

    return vars(account) | {
        "rows_bad": account.rows_bad,
        "rows_dropped": account.rows_dropped,
        "lengths": {str(length): account.lengths[length] for length in sorted(account.lengths)},
        "bad": lost_rows(account.bad),
        "dropped": lost_rows(account.dropped),
    }


def list_not_read(not_read: Iterable[NotRead]) -> dict[str, Any]:
    """What lies beside the files of a source as it stands in data_report.json: by reason, the count and the first."""
    listed: dict[str, Any] = {}
    for path, reason in not_read:
        entry = listed.setdefault(reason, {"count": 0, "first": []})
        entry["count"] += 1
        if entry["count"] <= NUM_SHOWN:
            entry["first"].append(path)
    return listed


def _add_counts(total: dict[Any, int], counts: Mapping[Any, int]) -> None:
    for name, count in counts.items():
        total[name] = total.get(name, 0) + count


def _explain(by_reason: dict[str, LostRows]) -> list[str]:
    """One paragraph per reason, the commonest first."""
    paragraphs = []
    for reason, lost in sorted(by_reason.items(), key=lambda item: -item[1].count):
        also = ", ".join(map(str, lost.origins[1:]))
        more = " ..." if lost.count > len(lost.origins) else ""
        paragraphs.append(f"  {lost.count:>6,} {reason}: {lost.origins[0]}: {lost.messages[0]}")
        if also:
            paragraphs.append(f"{'':9}also {also}{more}")
    return paragraphs
