"""What is said about a row is fit for a log, whatever the row holds."""

from sft_jax.data.errors import RowError
from sft_jax.datatypes import Origin


def test_a_message_is_one_line_whatever_the_names_in_a_row():
    message = f"has the fields a\nFATAL: \x1b[2J\u202e, {'b' * 10_000}; expected text. Rename them."
    error = str(RowError("wrong_format", Origin("rows.jsonl", 1), message))
    assert error.startswith("rows.jsonl:1: has the fields a\\nFATAL: \\x1b[2J\\u202e, bbb")
    assert error.endswith("Rename them.")
    assert len(error) < 1100


def test_a_message_of_printable_text_stays_as_it_is():
    assert (
        str(RowError("r", Origin("a", 1), "has 'é 漢 \U0001f600'. Mend it.")) == "a:1: has 'é 漢 \U0001f600'. Mend it."
    )
