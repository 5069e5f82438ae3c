"""A pattern of config.lora or config.model.freeze -> each part of it that must find something.

A pattern that finds anything passes for right, and the half of it that is misspelt is never missed: of
`(q_proj|k_porj)` one adapter in two would not be there.
"""

import re
from collections.abc import Iterable, Iterator
from itertools import islice, pairwise

_TOKEN = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\(\?#[^)]*\)|.", re.S)
_ENTERED = re.compile(r"\((?:\?(?:P<\w+>|[a-z-]*:|=|<=|>))?(?!\?)")  # a group that must match, unlike (?!...)
_BY_NUMBER = re.compile(r"\\[1-9]|\(\?P=|\(\?\(|\(\?\w*x")  # torn apart, they mean something else


def named_branches(patterns: Iterable[str]) -> Iterator[tuple[str, str]]:
    """(branch, what an error calls it) of all of them."""
    for pattern in patterns:
        for branch in branches(pattern):
            yield branch, repr(pattern) if branch == pattern else f"{branch!r}, a part of {pattern!r},"


def branches(pattern: str) -> Iterator[str]:
    """The pattern, and then again with each single branch of each alternation in it, the outer ones first.

    `(q|k)_proj` gives itself, `(q)_proj` and `(k)_proj`. What is repeated stays whole: `(a|b)+` may find only `ab`.
    """
    yield pattern
    if _BY_NUMBER.search(pattern):
        return
    depth, start = 0, 0
    bars, groups = [], []
    for token in _TOKEN.finditer(pattern):
        if token[0] == "(":
            start = start if depth else token.start()
            depth += 1
        elif token[0] == ")":
            depth -= 1
            groups += [] if depth else [(start, token.start())]
        elif token[0] == "|" and not depth:
            bars.append(token.start())
    if bars:
        for before, after in pairwise([-1, *bars, len(pattern)]):
            yield from branches(pattern[before + 1 : after])
        return
    for start, end in groups:
        opening = _ENTERED.match(pattern, start)
        if opening and pattern[end + 1 : end + 2] not in ("*", "+", "{"):
            for inner in islice(branches(pattern[opening.end() : end]), 1, None):
                yield pattern[: opening.end()] + inner + pattern[end:]
