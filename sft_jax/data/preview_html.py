"""Packed rows and their report as one HTML page that needs nothing else: no script, no file, no network.

Everything that comes from data is escaped, and the page's own policy forbids it to load or run anything.
"""

from collections.abc import Iterable, Iterator, Sequence
from html import escape
from typing import Any

import numpy as np

from sft_jax.data.preview import Segment, glyphs_of, runs_of, segments_of
from sft_jax.data.report_table import HELD_OUT, LOST_TO_LENGTH, balance, length_range, list_first
from sft_jax.data.tokenizer import Tokenizer
from sft_jax.datatypes import PackedRow

_STYLE = """
:root { color-scheme: light dark; --page: #f6f7f9; --card: #fff; --ink: #1b1f24; --soft: #667080; --line: #dfe3e8;
  --trained: 34 160 90; --bar: #4a7dbd; --pad: #d4d9e0; }
@media (prefers-color-scheme: dark) { :root { --page: #14171b; --card: #1c2026; --ink: #e4e8ee; --soft: #929cab;
  --line: #323943; --trained: 60 200 120; --bar: #6c9edb; --pad: #3a424d; } }
body { margin: 0 auto; max-width: 68rem; padding: 2rem 1.25rem 4rem; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: 0; } h2 { font-size: 1.1rem; margin: 2.2rem 0 .6rem; }
p, figure { margin: .3rem 0; } .soft { color: var(--soft); }
section, .facts div, table, figure { background: var(--card); border: 1px solid var(--line); border-radius: 8px; }
.facts { display: flex; flex-wrap: wrap; gap: .7rem; margin-top: 1.2rem; }
.facts div { flex: 1; padding: .5rem .9rem; white-space: nowrap; } .facts b { display: block; font-size: 1.25rem; }
table { border-collapse: separate; border-spacing: 0; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .8rem; text-align: right; border-top: 1px solid var(--line); vertical-align: top; }
tr:first-child th { border: 0; color: var(--soft); font-weight: 500; }
th:first-child, td:first-child, .lost td + td + td { text-align: left; } .lost td { font-size: .9em; }
.lost td:first-child { padding-left: 2rem; color: var(--soft); white-space: nowrap; }
figure { padding: .8rem; } svg { display: block; width: 100%; height: auto; } svg rect { fill: var(--bar); }
svg text { fill: var(--soft); font: 11px system-ui, sans-serif; text-anchor: middle; }
section { margin-bottom: 1rem; padding: .9rem 1rem; overflow: hidden; } h3 { font-size: 1rem; margin: 0 0 .5rem; }
.fill { display: flex; height: 8px; border-radius: 4px; overflow: hidden; gap: 1px; background: var(--pad); }
.fill i { background: var(--bar); }
.segment { margin-top: 1rem; padding-top: .6rem; border-top: 1px solid var(--line); }
pre { margin: .3rem 0 0; white-space: pre-wrap; overflow-wrap: anywhere; color: var(--soft);
  font: 13.5px/1.65 ui-monospace, monospace; }
.t { color: var(--ink); background: rgb(var(--trained) / calc(.1 + .25 * min(var(--w), 1))); border-radius: 3px; }
pre i { font-style: normal; } pre i:hover { outline: 1.5px solid var(--bar); border-radius: 3px; }
.n::before { content: "\\21b5"; opacity: .45; } .e::before { content: "\\2205"; opacity: .45; }
"""
_WIDTH, _HEIGHT = 720, 150


def preview_page(
    title: str, report: dict[str, Any], rows: Sequence[tuple[int, PackedRow]], tokenizer: Tokenizer
) -> str:
    """The page.

    Args:
      report: a `PackedDataset.report`.
      rows: (number of the row in the run, the row) of those to show.
    """
    names = list(report["sources"])
    parts = [
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width">',
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">",
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body>",
        f"<h1>{escape(title)}</h1>",
        *_facts(report),
        "<h2>Sources</h2>",
        *_source_table(report["sources"]),
        "<h2>Lengths of examples</h2>",
        *_histogram(report["sources"].values()),
        "<h2>Rows, exactly as the step receives them</h2>",
        '<p class="soft">Green is trained on, the stronger the greater its weight; grey is only read. '
        "Point at a token for its id, weight and position.</p>",
        *(part for number, row in rows for part in _row(number, row, names, tokenizer)),
        "</body></html>\n",
    ]
    return "\n".join(parts)


def _facts(report: dict[str, Any]) -> Iterator[str]:
    facts = {
        "examples": f"{report['examples']:,}",
        "tokens": f"{report['tokens']:,}",
        "supervised": f"{report['supervised_fraction']:.1%}",
        "rows an epoch": f"{report['rows_per_epoch']:,}",
        f"fill of {report['max_seq_len']:,} tokens": f"{report['fill_fraction']:.1%}",
        "steps an epoch": f"{report['steps_per_epoch']:,.1f}",
        "steps": f"{report['num_steps']:,}",
    }
    yield '<div class="facts">'
    for name, value in facts.items():
        yield f'<div><b>{value}</b><span class="soft">{name}</span></div>'
    yield "</div>"


def _source_table(sources: dict[str, dict[str, Any]]) -> Iterator[str]:
    rows = ("rows_read", "rows_trained", "rows_bad", "rows_dropped", "rows_not_taken")
    numbers = (*rows, "turns", "examples", "tokens", "supervised_tokens")
    headings = "".join(f"<th>{name.removeprefix('rows_').replace('_', ' ')}</th>" for name in numbers)
    yield f"<table><tr><th>source</th>{headings}</tr>"
    for name, source in sources.items():
        cells = "".join(f"<td>{source[number]:,}</td>" for number in numbers)
        where = f"{source['path']}: {balance(source)}"
        yield f'<tr><td title="{escape(where)}">{escape(name)}</td>{cells}</tr>'
        for what, count, notes in _source_notes(source):
            yield f'<tr class="lost"><td>{escape(what)}</td><td>{count:,}</td>'
            yield f'<td colspan="{len(numbers) - 1}">{"<br>".join(map(escape, notes))}</td></tr>'
    yield "</table>"


def _source_notes(source: dict[str, Any]) -> Iterator[tuple[str, int, list[str]]]:
    """(what, how many, what there is to say of it) of all else that was counted."""
    for reason, paths in source["files_not_read"].items():
        yield "files not read", paths["count"], [f"{reason}: {list_first(paths)}"]
    for kind in ("bad", "dropped"):
        for reason, lost in source[kind].items():
            yield f"{kind}: {reason}", lost["count"], [f"{row['origin']}: {row['message']}" for row in lost["first"]]
    if source["examples_held_out"]:
        yield "examples held out", source["examples_held_out"], [HELD_OUT]
    for name in LOST_TO_LENGTH:
        if source[name]:
            yield name.replace("_", " "), source[name], ["by config.data.too_long"]
    for name, count in source["rendering"].items():
        yield name.replace("_", " "), count, ["counted by the renderer"]
    for name, count in source["ignored_fields"].items():
        yield f"field {name}", count, ["rows have it; it is not read"]


def _histogram(sources: Iterable[dict[str, Any]]) -> Iterator[str]:
    """A bar for each power of two between the shortest and the longest example."""
    counts: dict[int, int] = {}
    for source in sources:
        for length, count in source["lengths"].items():
            counts[int(length)] = counts.get(int(length), 0) + count
    shortest, longest = min(counts), max(counts)
    bins = [shortest << i for i in range((longest // shortest).bit_length())]
    wide = _WIDTH / len(bins)
    yield f'<figure><svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="Examples by length">'
    for i, length in enumerate(bins):
        count, middle = counts.get(length, 0), (i + 0.5) * wide
        tall = (_HEIGHT - 40) * count / max(counts.values())
        bar = f'x="{i * wide + 2:.1f}" y="{_HEIGHT - 20 - tall:.1f}" width="{wide - 4:.1f}" height="{tall:.1f}" rx="2"'
        yield f"<rect {bar}><title>{count:,} examples of {length_range(str(length))} tokens</title></rect>"
        yield f'<text x="{middle:.1f}" y="{_HEIGHT - 25 - tall:.1f}">{count:,}</text>'
        yield f'<text x="{middle:.1f}" y="{_HEIGHT - 5}">{length_range(str(length))}</text>'
    yield "</svg></figure>"


def _row(number: int, row: PackedRow, names: Sequence[str], tokenizer: Tokenizer) -> Iterator[str]:
    segments, length = list(segments_of(row)), len(row.inputs)
    used = int(np.count_nonzero(row.segment_ids))
    parts = "".join(f'<i style="width:{100 * (len(segment.ids) - 1) / length:.3f}%"></i>' for segment in segments)
    yield f"<section><h3>Row {number:,}</h3>"
    yield f'<div class="fill" title="{used:,} of {length:,} tokens">{parts}</div>'
    yield f'<p class="soft">{len(segments):,} examples, {used:,} tokens, {length - used:,} of padding</p>'
    for place, segment in enumerate(segments, start=1):
        supervised = f"{len(segment.ids) - 1:,} tokens, {np.count_nonzero(segment.weights):,} supervised"
        where = f"{escape(str(segment.origin))} ({escape(names[segment.source_id])})"
        yield f'<div class="segment"><b>{place}</b> {where} <span class="soft">{supervised}</span>'
        yield f"<pre>{''.join(_tokens(segment, tokenizer))}</pre></div>"
    yield "</section>"


def _tokens(segment: Segment, tokenizer: Tokenizer) -> Iterator[str]:
    """Runs of one weight, and in them an element for each token."""
    for start, stop in runs_of(segment.weights):
        weight = float(segment.weights[start])
        yield f'<span class="t" style="--w:{weight:.4g}">' if weight else "<span>"
        for glyphs in glyphs_of(segment.ids, start, stop, tokenizer):
            ids = ", ".join(map(str, segment.ids[glyphs.start : glyphs.stop].tolist()))
            about = f"id {ids}, weight {weight:.4g}, position {glyphs.start}: {glyphs.text!r}"
            kind = ' class="e"' if not glyphs.text else ' class="n"' if glyphs.text.startswith("\n") else ""
            yield f'<i{kind} title="{escape(about)}">{escape(glyphs.text)}</i>'
        yield "</span>"
