"""A `PackedDataset.report` as a table for the terminal: where every row went, and what the trained ones came to."""

from collections.abc import Iterator
from typing import Any

from rich.markup import escape
from rich.table import Table

Line = tuple[str, str, str]
"""What is counted, how many, and what there is to say of it."""

LOST_TO_LENGTH = ("rows_shortened", "turns_lost", "tokens_lost", "supervised_tokens_lost")
HELD_OUT = "not trained on, as they are held out too, by config.data.eval_overlap"
_BAR_WIDTH = 24


def report_table(report: dict[str, Any]) -> Table:
    """Source by source, and then what packing made of them all."""
    table = Table(show_edge=False, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(overflow="fold")
    for name, source in report["sources"].items():
        table.add_row(escape(name), style="bold")
        for line in _source_lines(source):
            _add_line(table, line)
        table.add_section()
    table.add_row("all sources", style="bold")
    for line in _total_lines(report):
        _add_line(table, line)
    return table


def _add_line(table: Table, line: Line) -> None:
    what, count, note = line
    table.add_row(escape(f"  {what}"), count, escape(note))


def _source_lines(source: dict[str, Any]) -> Iterator[Line]:
    yield "files read", f"{source['files_read']:,}", ""
    for reason, paths in source["files_not_read"].items():
        yield "  not read", f"{paths['count']:,}", f"{reason}: {list_first(paths)}"
    yield "rows read", f"{source['rows_read']:,}", balance(source)
    yield "  trained", f"{source['rows_trained']:,}", ""
    for kind in ("bad", "dropped"):
        for reason, lost in source[kind].items():
            yield f"  {kind}: {reason}", f"{lost['count']:,}", ", ".join(row["origin"] for row in lost["first"])
    if source["rows_not_taken"]:
        yield "  not taken", f"{source['rows_not_taken']:,}", "of another split, or beyond max_rows"
    for what in ("turns", "tokens"):
        yield what, f"{source[what]:,}", ""
    share = source["supervised_tokens"] / max(source["tokens"], 1)
    yield "supervised tokens", f"{source['supervised_tokens']:,}", f"{share:.1%}"
    yield "examples", f"{source['examples']:,}", ""
    if source["examples_held_out"]:
        yield "  held out", f"{source['examples_held_out']:,}", HELD_OUT
    yield "  in an epoch", f"{source['examples_per_epoch']:,}", ""
    for name in LOST_TO_LENGTH:
        if source[name]:
            yield name.replace("_", " "), f"{source[name]:,}", "by config.data.too_long"
    for name, count in source["rendering"].items():
        yield f"rendering: {name.replace('_', ' ')}", f"{count:,}", ""
    for reason, count in source["kept"].items():
        yield f"kept: {reason}", f"{count:,}", "turns, by config.data.policies"
    for name, count in source["ignored_fields"].items():
        yield f"field {name} is not read", f"{count:,}", "rows have it"
    most = max(source["lengths"].values(), default=1)
    for length, count in source["lengths"].items():
        yield f"examples of {length_range(length)} tokens", f"{count:,}", "█" * -(-count * _BAR_WIDTH // most)


def _total_lines(report: dict[str, Any]) -> Iterator[Line]:
    yield "examples", f"{report['examples']:,}", ""
    if report["examples_held_out"]:
        yield "  held out", f"{report['examples_held_out']:,}", HELD_OUT
    yield "  in an epoch", f"{report['examples_per_epoch']:,}", ""
    yield "tokens", f"{report['tokens']:,}", ""
    yield "supervised tokens", f"{report['supervised_tokens']:,}", f"{report['supervised_fraction']:.1%}"
    rows = f"of {report['max_seq_len']:,} tokens, {report['fill_fraction']:.1%} full"
    yield "packed rows an epoch", f"{report['rows_per_epoch']:,}", rows
    yield "steps an epoch", f"{report['steps_per_epoch']:,.1f}", f"of {report['batch_size']:,} packed rows"
    yield "steps", f"{report['num_steps']:,}", f"{report['num_epochs']:,.2f} epochs"


def balance(source: dict[str, Any]) -> str:
    """The sum that every account keeps to."""
    names = {"rows_trained": "trained", "rows_bad": "bad", "rows_dropped": "dropped", "rows_not_taken": "not taken"}
    return "= " + " + ".join(f"{source[name]:,} {what}" for name, what in names.items())


def list_first(lost: dict[str, Any]) -> str:
    """The first of a reason, as the report has them."""
    return ", ".join(lost["first"]) + (", ..." if lost["count"] > len(lost["first"]) else "")


def length_range(up_to: str) -> str:
    """A key of `Account.lengths` as the lengths it stands for: 64 -> 33-64."""
    low = int(up_to) // 2 + 1
    return up_to if int(up_to) <= 2 else f"{low:,}-{int(up_to):,}"
