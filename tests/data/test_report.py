"""An account has a place for every row, adds up over parts as over the whole, and is shown in full."""

import io
import json
import re
from collections import Counter
from copy import deepcopy

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from word_renderer import WordRenderer, make_config

from sft_jax.data.errors import RowError
from sft_jax.data.pipeline import open_dataset
from sft_jax.data.report import Account, LostRows, account_to_json, check_account
from sft_jax.data.report_table import length_range, report_table
from sft_jax.data.too_long import FitResult, Lost
from sft_jax.datatypes import DataError, Origin, TokenizedExample

FIELD = "config.data.train[1]"
KINDS = ("trained", "bad", "dropped", "not taken")


def count_rows(rows):
    """The account of `rows`, each (path, line, kind, a number from 0 to 3 that says what is in it)."""
    account = Account()
    for path, line, kind, number in rows:
        origin = Origin(path, line)
        account.rows_read += 1
        if kind == "trained":
            examples = [TokenizedExample.from_ids(range(n + 2), [0] * (n + 1) + [1], origin) for n in range(number)]
            names = ["reasoning_split", "expanded", "control_text", "unknown_tokens"]
            fit = FitResult(examples, Lost(tokens=number), bool(number), number, number, Counter(names[number:]))
            account.add_trained(fit, Counter(names[:1]), names[:number])
        elif kind == "not taken":
            account.rows_not_taken += 1
        else:
            reasons = account.bad if kind == "bad" else account.dropped
            error = RowError(f"reason_{number}", origin, f"is wrong {line} times. Mend it.")
            reasons.setdefault(error.reason, LostRows()).add(error)
    return account


rows_of_a_source = st.lists(
    st.tuples(st.sampled_from(["a.jsonl", "b.jsonl"]), st.integers(1, 9), st.sampled_from(KINDS), st.integers(0, 3))
)


def merged(*accounts):
    total = deepcopy(accounts[0])
    for account in accounts[1:]:
        total.merge(account)
    return total


def as_bytes(account):
    """Also the order of reasons and names, which == of two dicts does not see."""
    return msgspec.json.encode(account)


@given(rows_of_a_source, rows_of_a_source, rows_of_a_source)
def test_accounts_of_parts_add_up_to_that_of_the_whole(first, second, third):
    a, b, c = (count_rows(rows) for rows in (first, second, third))
    parts = [as_bytes(account) for account in (a, b, c)]
    whole = count_rows(first + second + third)
    assert as_bytes(merged(a, b, c)) == as_bytes(whole)
    assert as_bytes(merged(a, merged(b, c))) == as_bytes(whole)
    assert as_bytes(merged(Account(), whole, Account())) == as_bytes(whole)
    assert [as_bytes(account) for account in (a, b, c)] == parts
    whole.check_balance()


@given(rows_of_a_source)
def test_an_account_survives_its_encoding(rows):
    account = count_rows(rows)
    again = msgspec.json.decode(as_bytes(account), type=Account)
    assert again == account
    assert all(isinstance(origin, Origin) for lost in again.bad.values() for origin in lost.origins)


def test_the_first_five_rows_of_a_reason_are_kept_whichever_file_they_are_of():
    a = count_rows([("a.jsonl", line, "bad", 0) for line in (2, 4, 6)])
    b = count_rows([("b.jsonl", line, "bad", 0) for line in (1, 2, 3)])
    (lost,) = merged(a, b).bad.values()
    assert lost.count == 6
    assert [str(origin) for origin in lost.origins] == ["a.jsonl:2", "a.jsonl:4", "a.jsonl:6", "b.jsonl:1", "b.jsonl:2"]
    assert lost.messages[3] == "is wrong 1 times. Mend it."


def test_lengths_are_counted_between_powers_of_two():
    account = Account()
    for length in (1, 2, 3, 4, 5, 64, 65):
        example = TokenizedExample.from_ids(np.zeros(length + 1), np.ones(length + 1), Origin("a.jsonl", 1))
        account.add_trained(FitResult([example], Lost(), False, 1, length, Counter()), Counter(), ())
    assert account.lengths == {1: 1, 2: 1, 4: 2, 8: 1, 64: 1, 128: 1}
    assert [length_range(up_to) for up_to in account_to_json_lengths(account)] == [
        "1",
        "2",
        "3-4",
        "5-8",
        "33-64",
        "65-128",
    ]


def account_to_json_lengths(account):
    account.rows_read = account.rows_trained
    return account_to_json(account)["lengths"]


@pytest.mark.parametrize(
    "use", [Account.check_balance, account_to_json, lambda account: check_account(account, "a", 1.0, FIELD)]
)
def test_a_row_without_a_place_is_noticed_by_whoever_uses_the_account(use):
    account = count_rows([("a", 1, kind, 1) for kind in KINDS])
    use(account)
    account.rows_read += 1
    with pytest.raises(AssertionError, match=r"^5 rows read are not 1 \+ 1 \+ 1 \+ 1 trained, bad, dropped"):
        use(account)


def test_rows_that_are_not_taken_are_in_no_fraction():
    rows = [("a", 1, "bad", 0), ("a", 2, "trained", 1), *[("a", line, "not taken", 0) for line in range(3, 99)]]
    check_account(count_rows(rows), "a", 0.5, FIELD)
    with pytest.raises(
        DataError, match=rf"^{re.escape(FIELD)}\.path: 1 of 2 rows of a are bad; .* allows 0\.4 of them"
    ):
        check_account(count_rows(rows), "a", 0.4, FIELD)
    with pytest.raises(
        DataError, match=rf"^{re.escape(FIELD)}: none of the 96 rows of a is taken\. Take more by its split"
    ):
        check_account(count_rows(rows[2:]), "a", 1.0, FIELD)


def test_rows_are_named_by_file_and_line_in_json():
    account = count_rows([("a", 7, "bad", 2), ("b", 1, "trained", 3), ("b", 2, "not taken", 0)])
    report = account_to_json(account)
    assert json.loads(json.dumps(report)) == report
    assert report["bad"] == {
        "reason_2": {"count": 1, "first": [{"origin": "a:7", "message": "is wrong 7 times. Mend it."}]}
    }
    assert (report["rows_bad"], report["rows_dropped"], report["rows_not_taken"], report["tokens_lost"]) == (1, 0, 1, 3)


# --- The table --------------------------------------------------------------------------------------------------------


def test_the_table_has_the_whole_account(tmp_path):
    path = tmp_path / "mixed[1].jsonl"
    good = '{"prompt": "1 2", "completion": "3", "id[2]": 7}'
    path.write_text("\n".join([good, good.replace("1 2", "1 " * 30), *["broken"] * 6, good.replace("1 2", "?")]))
    config = make_config(tmp_path, path, max_bad_fraction=0.9, too_long="drop", unknown_tokens="keep")
    renderer = WordRenderer("keep")
    data = open_dataset(config.data.train, config, renderer, batch_size=2, num_epochs=3, num_steps=None, shuffle=True)
    console = Console(width=1000, file=io.StringIO())
    console.print(report_table(data.report))
    lines = [[cell.strip() for cell in line.split("│")] for line in console.file.getvalue().splitlines()]
    first_five = ", ".join(f"{path}:{line}" for line in range(3, 8))
    for line in (
        ["mixed[1]", "", ""],
        ["files read", "1", ""],
        ["rows read", "9", "= 2 trained + 6 bad + 1 dropped + 0 not taken"],
        ["bad: malformed_json", "6", first_five],
        ["dropped: too_long", "1", f"{path}:2"],
        ["supervised tokens", "4", "36.4%"],
        ["rendering: unknown tokens", "1", ""],
        ["field id[2] is not read", "2", "rows have it"],
        ["examples of 5-8 tokens", "2", "█" * 24],
        ["in an epoch", "2", ""],
        ["packed rows an epoch", "1", "of 16 tokens, 68.8% full"],
        ["steps an epoch", "0.5", "of 2 packed rows"],
        ["steps", "2", "3.00 epochs"],
    ):
        assert line in lines, "\n".join(map(str, lines))
