"""Why one row cannot be trained on: raised by parsing and rendering, counted or made fatal by the pipeline."""

import re

from sft_jax.datatypes import DataError, Origin

_MAX_CHARACTERS = 1000
# What breaks a line, moves a terminal's cursor or turns its text around.
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


class RowError(DataError):
    """One row is wrong. `reason` is its line in the data report (`unknown_token`, `no_assistant_turn`, ...)."""

    def __init__(self, reason: str, origin: Origin, message: str):
        super().__init__(f"{origin}: {_make_printable(message)}")
        self.reason = reason
        self.origin = origin


def _make_printable(message: str) -> str:
    """One line of a length to read: a message names fields and roles as the row has them, and they may be anything."""
    if len(message) > _MAX_CHARACTERS:  # what to do stands at the end
        message = f"{message[: _MAX_CHARACTERS // 2]} ... {message[-_MAX_CHARACTERS // 2 :]}"
    return _CONTROL.sub(lambda found: repr(found[0])[1:-1], message)
