"""A text's ids from those of its words, each encoded by sentencepiece once.

A BPE model merges neighbours whose concatenation is a piece. Where no piece has a space behind another character, no
merge crosses the border before a run of spaces, so the ids of a text are those of the texts between such borders:

    "the cat sat"  ->  "the" | " cat" | " sat"

Newlines and digits are borders too, where no piece joins them to anything, and so is a mark at the end of a word, where
no piece joins it to what is before it. The ids are those of the whole text, or the model is not cut (`open_words`).
GSM8K takes half of the time so, and a quarter once its words are known.
"""

import re
from array import array
from collections.abc import Callable
from typing import Any

_SPACE = "▁"
_CUT_AT_SPACES = re.compile(r"[ ▁]*[^ ▁]+|[ ▁]+")
_CUT_AT_NEWLINES_TOO = re.compile(r"\n+|[ ▁]*[^ ▁\n]+|[ ▁]+")
_DIGIT = re.compile("[0-9]")
_CUT_AT_DIGITS = re.compile(r"[0-9]|[^0-9]+")
_MARKS = ".,:;?!)"
_UNUSUAL = ("  ", "\n\n", "▁", "\0")  # without these, each space and each newline is a border of its own
_MAX_WORDS = 2**17  # about 200 bytes each
_MAX_CHARACTERS = 64  # of a word that is remembered


class Words(dict[str, bytes]):
    """Word -> its ids, int32; filled as they are asked for."""

    def __init__(
        self,
        borders: re.Pattern[str],
        are_digits_alone: bool,
        joined: frozenset[str],
        encode: Callable[[str], list[int]],
    ):
        """Made by `open_words`. `joined`: the pairs of a character and a punctuation mark that a piece holds."""
        super().__init__()
        self._borders = borders
        self._are_digits_alone = are_digits_alone
        self._joined = joined
        self._encode = encode

    def __missing__(self, word: str) -> bytes:
        if len(word) > 1 and self._are_digits_alone and _DIGIT.search(word):
            ids = b"".join(map(self.__getitem__, _CUT_AT_DIGITS.findall(word)))
        elif len(word) > 1 and word[-1] in _MARKS and word[-2:] not in self._joined:
            ids = self[word[:-1]] + self[word[-1]]
        else:
            ids = array("i", self._encode(word)).tobytes()
        if len(word) <= _MAX_CHARACTERS:
            if len(self) >= _MAX_WORDS:
                self.clear()
            self[word] = ids
        return ids

    def encode(self, text: str) -> bytes:
        """Ids, int32."""
        return b"".join(map(self.__getitem__, self._cut(text)))

    def _cut(self, text: str) -> list[str]:
        """The words of a text, some of them empty."""
        if self._borders is not _CUT_AT_NEWLINES_TOO or any(map(text.__contains__, _UNUSUAL)):
            return self._borders.findall(text)
        return text.replace(" ", "\0 ").replace("\n", "\0\n\0").split("\0")  # in two thirds of the time


def open_words(proto: Any, encode: Callable[[str], list[int]]) -> Words | None:
    """For a sentencepiece ModelProto that leaves texts as they are (no character map, no removed spaces) and has a
    piece for each byte; None where its words are not independent.

    Args:
      encode: ids of a text with no space put before it.
    """
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    pieces = [piece.piece for piece in proto.pieces if piece.type in (piece.NORMAL, piece.USER_DEFINED, piece.UNUSED)]
    # A unigram model adds up scores along the whole text, and their rounding may decide.
    if trainer.model_type != trainer.BPE or not normalizer.escape_whitespaces or _SPACE not in pieces:
        return None
    listed = " ".join(pieces)  # no piece that can match holds a space itself
    if re.search("[^▁ ]▁", listed):
        return None
    joins_newlines = re.search(r"[^\n ]\n|\n[^\n ]", listed)
    joins_digits = re.search("[0-9][^ ]|[^ ][0-9]", listed)
    pairs = re.findall(f"(?=(.[{re.escape(_MARKS)}]))", listed, re.DOTALL)
    joined = frozenset([*pairs, *(pair.replace(_SPACE, " ") for pair in pairs)])
    return Words(_CUT_AT_SPACES if joins_newlines else _CUT_AT_NEWLINES_TOO, not joins_digits, joined, encode)
