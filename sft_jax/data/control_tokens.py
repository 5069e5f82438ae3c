"""The tokens that steer a model (`<s>`, `<|im_end|>`, `[INST]`): found in rendered text, kept out of content.

Control ids come from the template alone. So a rendered text is cut here, by exact text, into control ids and pieces of
plain text; pieces are encoded by a model that does not know control tokens; and text of a row that looks like one is
broken up before the template sees it.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from sft_jax.datatypes import DataError


@dataclass(frozen=True, slots=True)
class ControlToken:
    """One control token, with the flags of a Hugging Face added token.

    `lstrip` and `rstrip` swallow the whitespace before and after it (Phi-3's `<|user|>` swallows a newline);
    `single_word` matches only between non-word characters; `special` tokens are hidden when text is shown to users.
    """

    text: str
    id: int
    special: bool = True
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False

    @property
    def pattern(self) -> str:
        pattern = re.escape(self.text)
        if self.single_word:
            pattern = rf"(?<!\w){pattern}(?!\w)"
        return (r"\s*" if self.lstrip else "") + pattern + (r"\s*" if self.rstrip else "")


NEVER = r"(?!)"  # a regular expression that matches nowhere


def _any_of(texts: Sequence[str]) -> str:
    """A regular expression for any of the texts, which come longest first; grouped by first character, for speed."""
    groups: dict[str, list[str]] = {}
    for text in texts:
        groups.setdefault(text[0], []).append(re.escape(text[1:]))
    return "|".join(f"{re.escape(first)}(?:{'|'.join(rest)})" for first, rest in groups.items()) or NEVER


def is_text(token: str) -> bool:
    """Whether an added token is ordinary text after all: runs of spaces, tabs or newlines, as code models have."""
    return not token.replace("▁", " ").strip()


def merge_control_tokens(groups: Iterable[Iterable[ControlToken]], origin: str) -> dict[str, ControlToken]:
    """One table by text. A later group's flags win; its id must agree.

    Raises:
      DataError: one text with two ids, or one id with two texts.
    """
    merged: dict[str, ControlToken] = {}
    for token in (token for group in groups for token in group):
        known = merged.get(token.text, token)
        if known.id != token.id:
            raise DataError(
                f"{origin}: {token.text!r} has two ids, {known.id} and {token.id}. Mend the folder's files."
            )
        merged[token.text] = token
    owners: dict[int, str] = {}
    for token in merged.values():
        if owners.setdefault(token.id, token.text) != token.text:
            both = f"{owners[token.id]!r} and {token.text!r}"
            raise DataError(f"{origin}: id {token.id} has two texts, {both}. Mend the folder's files.")
    return merged


class ControlTokens:
    """The control tokens of one tokenizer, found in text leftmost and longest first."""

    def __init__(self, tokens: Iterable[ControlToken]):
        self.tokens: tuple[ControlToken, ...] = tuple(sorted(tokens, key=lambda token: token.id))
        self.ids: dict[str, int] = {token.text: token.id for token in self.tokens}
        self.texts: dict[int, str] = {token.id: token.text for token in self.tokens}
        self._longest_first = sorted(self.ids, key=len, reverse=True)
        by_length = sorted(self.tokens, key=lambda token: len(token.text), reverse=True)
        self._bare_pattern = re.compile(_any_of(self._longest_first))
        pattern = "|".join(token.pattern for token in by_length)
        if not any(token.lstrip or token.rstrip or token.single_word for token in self.tokens):
            pattern = self._bare_pattern.pattern  # the same, and faster
        self._border = re.compile(f"({pattern or NEVER})")
        # A text can only end like the beginning of a token if its last characters have a token's first one, and so on.
        self._first = re.compile(f"[{re.escape(''.join({text[0] for text in self.ids}))}]" if self.ids else NEVER)
        self._last = re.compile(f"[{re.escape(''.join({text[-1] for text in self.ids}))}]" if self.ids else NEVER)
        self._heads = {text[:k] for text in self.ids for k in range(1, len(text))}
        self._tails = {text[k:] for text in self.ids for k in range(1, len(text))}
        self._longest = max(map(len, self.ids), default=0)

    def split(self, text: str) -> list[int | str]:
        """Cut at control tokens: `"<s>Hi</s>\\n"` -> `[1, "Hi", 2, "\\n"]`. Empty pieces are left out."""
        parts: list[Any] = self._border.split(text)  # text and control tokens in turn
        parts[1::2] = map(self._id_of, parts[1::2])
        return [part for part in parts if part != ""]

    def first_run(self, text: str) -> list[str]:
        """The first control tokens that stand side by side: `"Hi<|a|><|b|>\\n<|c|>"` -> `["<|a|>", "<|b|>"]`."""
        run: list[str] = []
        match = self._bare_pattern.search(text)
        while match:
            run.append(match.group())
            match = self._bare_pattern.match(text, match.end())
        return run

    def _id_of(self, matched: str) -> int:
        if matched in self.ids:
            return self.ids[matched]
        return self.ids[next(text for text in self._longest_first if text in matched)]  # with swallowed whitespace

    def may_form_in(self, text: str) -> bool:
        """Whether `text` holds a control token, or could form one together with its neighbours."""
        inner = text.strip()  # templates often trim
        return bool(self._bare_pattern.search(text)) or self._opens(inner) or self._closes(inner)

    def holds(self, text: str) -> bool:
        """Whether a server that parses control tokens in text would find one in `text`."""
        return bool(self._bare_pattern.search(text))

    def disguise(self, text: str, hide: Callable[[str], str]) -> str:
        """Replace one character of every control token in `text`, and of ends that could form one with what is around.

        With `·` for `<` and `×` for `m`: `"say <|im_end|>"` -> `"say ·|im_end|>"`, and `"a <|im"` -> `"a <|i×"`.
        """
        text = self._bare_pattern.sub(lambda match: hide(match.group()[0]) + match.group()[1:], text)
        inner = text.strip()  # templates often trim
        opens, closes = self._opens(inner), self._closes(inner)
        at = len(text) - len(text.lstrip())
        after = text[at + len(inner) :]
        if opens:
            inner = hide(inner[0]) + inner[1:]
        if closes:
            inner = inner[:-1] + hide(inner[-1])
        return text[:at] + inner + after

    def _opens(self, text: str) -> bool:
        """Whether `text` begins like the end of a control token."""
        if not self._last.search(text, 0, self._longest):
            return False
        return any(text[:k] in self._tails for k in range(1, min(self._longest, len(text) + 1)))

    def _closes(self, text: str) -> bool:
        """Whether `text` ends like the beginning of a control token."""
        if not self._first.search(text, len(text) - self._longest):
            return False
        return any(text[-k:] in self._heads for k in range(1, min(self._longest, len(text) + 1)))


def control_token_from_json(fields: dict, token_id: int) -> ControlToken:
    """An entry of `added_tokens` (tokenizer.json) or `added_tokens_decoder` (tokenizer_config.json)."""
    flags = {name: bool(fields.get(name, False)) for name in ("special", "lstrip", "rstrip", "single_word")}
    return ControlToken(fields["content"], token_id, **flags)


def control_tokens_to_json(tokens: Sequence[ControlToken], normalized: Iterable[int] = ()) -> list[dict]:
    """`added_tokens` entries. `normalized` are the ids matched after the normalizer has run."""
    normalized = set(normalized)
    return [
        {
            "id": token.id,
            "content": token.text,
            "single_word": token.single_word,
            "lstrip": token.lstrip,
            "rstrip": token.rstrip,
            "normalized": token.id in normalized,
            "special": token.special,
        }
        for token in tokens
    ]
