"""Each branch of a pattern's alternations stands for itself, and nothing that a pattern says otherwise is torn."""

import re

import pytest

from sft_jax.model.name_patterns import branches


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("q_proj", []),
        ("q|k", ["q", "k"]),
        ("(q|k)_proj", ["(q)_proj", "(k)_proj"]),
        ("a|(b|c)d", ["a", "(b|c)d", "(b)d", "(c)d"]),
        ("((a|b)|c)", ["((a|b))", "((a))", "((b))", "(c)"]),
        ("(a|b)(?P<n>c|d)?", ["(a)(?P<n>c|d)?", "(b)(?P<n>c|d)?", "(a|b)(?P<n>c)?", "(a|b)(?P<n>d)?"]),
        (r"a\|b[|(\]]", []),
        (r"(\d|\.)+b|(a|b){2}", [r"(\d|\.)+b", "(a|b){2}"]),  # together they may find what neither does alone
        ("(?!a|b)c", []),
        (r"(a|b)\1", []),
    ],
)
def test_branches(pattern: str, expected: list[str]) -> None:
    assert list(branches(pattern)) == [pattern, *expected]
    for branch in expected:
        re.compile(branch)
