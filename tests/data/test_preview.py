"""What a person sees is what the step receives: every token, its weight and its origin, and nothing of it runs."""

import io
import re
from collections import Counter
from html.parser import HTMLParser

import numpy as np
import pytest
from rich.console import Console

from sft_jax.data.errors import RowError
from sft_jax.data.packing import assemble_rows
from sft_jax.data.preview import glyphs_of, preview_row, runs_of, segments_of, weights_of
from sft_jax.data.preview_html import preview_page
from sft_jax.data.report import Account, LostRows, account_to_json, list_not_read
from sft_jax.data.sources import NotRead
from sft_jax.data.tokenizer import load_tokenizer
from sft_jax.data.too_long import FitResult, Lost
from sft_jax.datatypes import Origin, PackedRow, TokenizedExample

TEXTS = (
    "The answer is 72.",
    "नमस्ते 👩‍👩‍👧, 你好🙂 -- \ufffd, tabs\tand\n\n  spaces ",
    "<script>alert(1)</script> </style></pre> <img src=x onerror=y> &amp; \"'>",
)


@pytest.fixture(scope="module", params=["tiny_sentencepiece", "tiny_byte_level"])
def tokenizer(request):
    return load_tokenizer(request.getfixturevalue(request.param))


def encode(tokenizer, text, number, path="chats.jsonl"):
    """The text after a control token: the first of several weights, the others of one."""
    ids = [min(tokenizer.control_tokens.values()), *tokenizer.encode(text, continuation=True)]
    weights = np.full(len(ids), 0.5 * (number - 1))
    if number == 1:
        weights = np.linspace(0, 1.4, len(ids)).round(0)
        weights[len(ids) // 2] = 0.25
    return TokenizedExample.from_ids(ids, weights, Origin(path, number))


def assemble_row(examples, source_ids, max_seq_len):
    views = [(example.inputs, example.targets, example.loss_weights) for example in examples]
    arrays = assemble_rows(views, source_ids, [len(examples)], max_seq_len)
    origins = tuple(example.origin for example in examples)
    return PackedRow(**{name: array[0] for name, array in arrays._asdict().items()}, origins=origins)


@pytest.fixture(scope="module")
def row(tokenizer):
    examples = [encode(tokenizer, text, number) for number, text in enumerate(TEXTS, start=1)]
    return assemble_row(examples, np.array([0, 1, 1]), sum(map(len, examples)) + 10)


def test_segments_are_the_examples_that_were_laid(tokenizer, row):
    segments = list(segments_of(row))
    for number, (segment, text) in enumerate(zip(segments, TEXTS, strict=True), start=1):
        example = encode(tokenizer, text, number)
        assert segment.origin == example.origin
        assert segment.ids.tolist() == example.ids.tolist()
        assert segment.weights.tolist() == weights_of(example).tolist()
    assert [segment.source_id for segment in segments] == [0, 1, 1]


def test_runs_of_equal_weight():
    assert list(runs_of(np.array([0, 0, 1, 1, 1, 0], np.float32))) == [(0, 2), (2, 5), (5, 6)]
    assert list(runs_of(np.zeros(1, np.float32))) == [(0, 1)]


@pytest.mark.parametrize("text", TEXTS)
def test_tokens_one_by_one_show_the_text_of_them_all(tokenizer, text):
    ids = encode(tokenizer, text, 1).ids
    glyphs = list(glyphs_of(ids, 0, len(ids), tokenizer))
    assert [glyph.start for glyph in glyphs] + [len(ids)] == [0] + [glyph.stop for glyph in glyphs]
    assert "".join(glyph.text for glyph in glyphs) == tokenizer.decode(ids.tolist())
    assert "".join(glyph.text for glyph in glyphs).endswith(text)
    assert sum(glyph.stop - glyph.start == 1 for glyph in glyphs) > len(glyphs) / 2


def test_bytes_that_are_no_character_are_one_token_each(tokenizer):
    ids = np.array(tokenizer.encode("🙂", continuation=True)[:-1] * 6)
    assert [glyph.stop - glyph.start for glyph in glyphs_of(ids, 0, len(ids), tokenizer)] == [1] * len(ids)


def test_the_terminal_has_origins_text_and_padding(tokenizer, row):
    console = Console(file=io.StringIO(), width=10_000)
    console.print(preview_row(row, tokenizer), soft_wrap=True)
    text = console.file.getvalue()
    supervised = [np.count_nonzero(segment.weights) for segment in segments_of(row)]
    for number, segment in enumerate(segments_of(row), start=1):
        head = f"[{number}] chats.jsonl:{number}  {len(segment.ids) - 1} tokens, {supervised[number - 1]} supervised"
        assert head in text.splitlines()
    assert TEXTS[0] in text
    assert text.splitlines()[-1] == "10 tokens of padding"


def test_the_terminal_is_coloured_by_weight(tokenizer):
    example = encode(tokenizer, TEXTS[0], 1)
    row = assemble_row([example], np.array([0]), len(example))
    text = preview_row(row, tokenizer)
    styles = {text.plain[span.start : span.end]: str(span.style) for span in text.spans}
    weights = weights_of(example)
    for start, stop in runs_of(weights):
        shown = tokenizer.decode(example.ids[start:stop].tolist(), continuation=bool(start))
        assert styles[shown] == {0.0: "dim", 1.0: "bold green"}.get(float(weights[start]), "yellow")


def test_no_text_moves_the_terminal(tokenizer):
    example = encode(tokenizer, "a\x1b[2K\x07\r\u202eb\n\tc", 1)
    text = preview_row(assemble_row([example], np.array([0]), len(example)), tokenizer).plain
    assert "a\\x1b[2K\\x07\\r\\u202eb\n\tc" in text


# --- The page ---------------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """What a browser sees: elements, the text in each <pre>, and the titles of the tokens."""

    def __init__(self, page):
        super().__init__(convert_charrefs=True)
        self.tags, self.open, self.pre, self.tokens, self.text = Counter(), [], [], [], ""
        self.attributes = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags[tag] += 1
        self.attributes += attributes
        if tag not in ("meta", "br"):
            self.open.append(tag)
        if tag == "pre":
            self.pre.append("")
            self.tokens.append([])
        elif tag == "i" and "pre" in self.open:
            self.tokens[-1].append(dict(attributes)["title"])

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "pre" in self.open:
            self.pre[-1] += data
        elif "style" not in self.open:
            self.text += data


def make_report(row, names=("a", "b")):
    """The account of the row's segments, in two sources, with all kinds of losses."""
    sources = {}
    for index, name in enumerate(names):
        account = Account(rows_read=3, rows_shortened=1, tokens_lost=1234, ignored_fields={"<i>id": 2})
        segments = [segment for segment in segments_of(row) if segment.source_id == index]
        examples = [TokenizedExample.from_ids(s.ids, s.weights, s.origin) for s in segments]
        num_supervised = sum(np.count_nonzero(example.loss_weights) for example in examples)
        fit = FitResult(examples, Lost(), False, len(segments), num_supervised, Counter(control_text=1))
        account.add_trained(fit, Counter(), ())
        for losses in (account.bad, account.dropped):
            error = RowError("<b>reason", Origin("<path>.jsonl", 9), "has </table><script>x</script>. Mend it.")
            losses.setdefault(error.reason, LostRows()).add(error)
        not_read = list_not_read([NotRead("<i>.md", "of a kind that is not read")] * 6)
        files = {"path": f"{name}.jsonl", "files_read": 1, "files_not_read": not_read, "examples_held_out": 21}
        sources[name] = {**files, **account_to_json(account)}
    totals = {"examples": 3, "tokens": 4567, "supervised_fraction": 0.25, "rows_per_epoch": 7, "max_seq_len": 99}
    return totals | {"fill_fraction": 0.875, "steps_per_epoch": 1.5, "num_steps": 3, "sources": sources}


def test_the_page_has_every_token_with_id_weight_and_position(tokenizer, row):
    page = Page(preview_page("run", make_report(row), [(4, row)], tokenizer))
    assert page.pre == [tokenizer.decode(segment.ids.tolist()) for segment in segments_of(row)]
    for segment, titles in zip(segments_of(row), page.tokens, strict=True):
        shown = []
        for title in titles:
            ids, weight, position = re.match(r"id ([\d, ]+), weight ([\d.]+), position (\d+): ", title).groups()
            ids = [int(i) for i in ids.split(", ")]
            assert int(position) == len(shown)
            assert {float(weight)} == set(segment.weights[len(shown) : len(shown) + len(ids)].tolist())
            shown += ids
        assert shown == segment.ids.tolist()
    assert "Row 4" in page.text
    for number, name in enumerate("abb", start=1):
        assert f"chats.jsonl:{number} ({name})" in page.text


def test_the_page_has_sources_losses_and_lengths(tokenizer, row):
    page = Page(preview_page("run", make_report(row), [(0, row)], tokenizer))
    for text in ("bad: <b>reason", "dropped: <b>reason", "1,234", "87.5%", "control text", "field <i>id", "4,567"):
        assert text in page.text
    assert f"files not read6of a kind that is not read: {', '.join(['<i>.md'] * 5)}, ..." in "".join(
        page.text.split("\n")
    )
    assert "examples held out21not trained on" in "".join(page.text.split("\n"))
    assert "<path>.jsonl:9: has </table><script>x</script>. Mend it." in page.text
    lengths = Counter(1 << (len(segment.ids) - 2).bit_length() for segment in segments_of(row))
    for up_to, count in lengths.items():
        assert f"{count} examples of {up_to // 2 + 1}-{up_to} tokens" in page.text


def test_nothing_of_the_data_becomes_part_of_the_page(tokenizer, row):
    harmless = assemble_row([encode(tokenizer, "a", 1)], np.array([0]), 9)
    evil = Page(preview_page("<script>", make_report(row, ("</td><script>", '" onclick="x')), [(0, row)], tokenizer))
    plain = Page(preview_page("run", make_report(harmless, "ab"), [(0, harmless)], tokenizer))
    assert evil.tags.keys() == plain.tags.keys()
    assert {name for name, _ in evil.attributes} == {name for name, _ in plain.attributes}


def test_the_page_needs_nothing_else(tokenizer, row):
    page = Page(preview_page("run", make_report(row), [(0, row)], tokenizer))
    assert not {"script", "link", "img", "iframe", "object"} & page.tags.keys()
    assert not {"src", "href", "srcset"} & {name for name, _ in page.attributes}
    assert ("content", "default-src 'none'; style-src 'unsafe-inline'") in page.attributes
