"""An example that grows turn by turn: ids and weights appended by one call, so that they cannot part."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from sft_jax.data.tokenizer import Tokenizer
from sft_jax.data.turns import Turn
from sft_jax.datatypes import Origin, TokenizedExample, shift

_ID_BYTES = 4

Parts = list[int | str]
"""A rendered text, cut into control ids and plain text."""


class RenderedExample(NamedTuple):
    """An example, and the turns that it supervises; none for a document."""

    example: TokenizedExample
    turns: tuple[int, ...] = ()
    """The numbers of their messages."""
    answers: tuple[tuple[int, int], ...] = ()
    """Of each, the positions [start, stop) of the example at which the model is asked for the turn, through its stop
    token."""


class RenderedRow(NamedTuple):
    """The examples of a row, and what was counted on the way, by name: `expanded`: turns that became examples of their
    own; `reasoning_split`: contents that opened with the template's reasoning marks; `control_text`: 1 where the row
    has text that a server which parses control tokens in text would feed differently; `unknown_tokens`: kept."""

    examples: list[RenderedExample]
    counts: Mapping[str, int]


@dataclass(slots=True)
class ExampleBuilder:
    """See the module's text. `leads_to` says whether the next turn may join."""

    ids: list[bytes] = field(default_factory=list)  # int32, part by part
    num_ids: int = 0
    weighted: list[tuple[int, int, float]] = field(default_factory=list)  # ids [start, stop) of a weight above 0
    turns: list[int] = field(default_factory=list)  # numbers of the messages that are supervised
    spans: list[tuple[int, int]] = field(default_factory=list)  # of each, its ids [start, stop)
    last: Turn | None = None  # whose `prompt + completion` is the text so far
    shares: bool = False  # whether a later prompt that begins with that text begins with `ids` too

    def leads_to(self, prompt: str) -> bool:
        return self.shares and self.last is not None and prompt.startswith(self.last.prompt + self.last.completion)

    @property
    def stop_at(self) -> int:
        """Where in the text the last stop token begins; where the template writes none, where the text ends."""
        return len(self.last.prompt) + len(self.last.completion) - len(self.last.stop) if self.last else 0

    def append(self, ids: Sequence[bytes], weight: float) -> None:
        start = self.num_ids
        self.ids += ids
        self.num_ids += sum(map(len, ids)) // _ID_BYTES
        if weight:
            self.weighted.append((start, self.num_ids, weight))

    def end_turn(self, number: int, turn: Turn, num_before: int, shares: bool) -> None:
        """The ids so far are those of `turn.prompt + turn.completion`; the completion's begin at `num_before`."""
        self.turns.append(number)
        self.spans.append((num_before, self.num_ids))
        self.last, self.shares = turn, shares

    def finish(self, origin: Origin, averaging: str) -> RenderedExample:
        """`averaging` as in `config.data`: by `example`, the weights of the example sum to 1."""
        ids = np.frombuffer(b"".join(self.ids), np.int32)
        weights = np.empty(self.num_ids, np.float32)
        weights.fill(0.0)  # np.zeros would let go of the interpreter lock for a moment, and so starve who waits for it
        for start, stop, weight in self.weighted:
            weights[start:stop] = weight
        if averaging == "example":
            weights /= max(weights[1:].sum(dtype=np.float64), np.finfo(np.float32).tiny)  # the first is never a target
        # The id at place k is the target of position k - 1.
        answers = tuple([(max(start - 1, 0), stop - 1) for start, stop in self.spans])
        return RenderedExample(TokenizedExample(*shift(ids, weights), origin), tuple(self.turns), answers)


def join_parts(prompt: Parts, completion: Parts) -> Parts:
    """The parts of two texts as the parts of one."""
    if prompt and isinstance(prompt[-1], str) and isinstance(completion[0], str):
        return [*prompt[:-1], prompt[-1] + completion[0], *completion[1:]]
    return prompt + completion


def split_reasoning(
    parts: Parts, ids: Sequence[bytes], reasoning: str, opens: str, tokenizer: Tokenizer
) -> list[tuple[bytes, bool]]:
    """Runs of the ids of a completion, in order, each with whether it is of the reasoning: the text behind the mark
    that opens it, which may stand in the prompt already. A token that straddles the border counts as outside."""
    texts = [tokenizer.control.texts[part] if isinstance(part, int) else part for part in parts]
    is_open, is_found = not any(opens in text for text in texts), False
    runs: list[tuple[bytes, bool]] = []
    for part, text, part_ids in zip(parts, texts, ids, strict=True):
        at = -1
        if not is_found and (is_open or opens in text):
            at = text.find(reasoning, 0 if is_open else text.find(opens) + len(opens))
            is_open = True
        if at < 0 or isinstance(part, int):
            runs.append((part_ids, False))
            continue
        is_found = True
        heads = (tokenizer.encode(text[:k], continuation=True) for k in (at, at + len(reasoning)))
        start, end = (_ID_BYTES * _num_shared(head, np.frombuffer(part_ids, np.int32)) for head in heads)
        runs += ((part_ids[:start], False), (part_ids[start:end], True), (part_ids[end:], False))
    return runs


def _num_shared(a: Sequence[int], b: np.ndarray) -> int:
    """Length of the common beginning."""
    return next((k for k, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
