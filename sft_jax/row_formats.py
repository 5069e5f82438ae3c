"""The formats of a row: the fields that each needs, and those that it reads besides. `data/formats.py` reads them."""

import functools
from dataclasses import dataclass


@dataclass(frozen=True)
class Format:
    needs: tuple[frozenset[str], ...]
    """Sets of fields; a row has all of one of them."""
    may_have: frozenset[str] = frozenset()

    @functools.cached_property
    def reads(self) -> frozenset[str]:
        return self.may_have.union(*self.needs)


_TOOLS = frozenset({"tools", "functions"})
FORMATS: dict[str, Format] = {
    "messages": Format((frozenset({"messages"}),), _TOOLS | {"system"}),
    "sharegpt": Format((frozenset({"conversations"}), frozenset({"conversation"})), _TOOLS | {"system"}),
    "alpaca": Format((frozenset({"instruction", "output"}),), _TOOLS | {"input", "system", "history"}),
    "prompt_completion": Format((frozenset({"prompt", "completion"}),), _TOOLS | {"system"}),
    "text": Format((frozenset({"text"}),)),
}
FIELD_NAMES = frozenset().union(*(format.reads for format in FORMATS.values()))
"""What a source's `fields` may map."""
