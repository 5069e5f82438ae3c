"""Why one row cannot be trained on: raised by parsing and rendering, counted or made fatal by the pipeline."""

from sft_jax.datatypes import DataError, Origin


class RowError(DataError):
    """One row is wrong. `reason` is its line in the data report (`unknown_token`, `no_assistant_turn`, ...)."""

    def __init__(self, reason: str, origin: Origin, message: str):
        super().__init__(f"{origin}: {message}")
        self.reason = reason
        self.origin = origin
