"""A row and a renderer in; examples of at most max_seq_len tokens out, and the count of what was lost on the way.

    error, drop         the row is refused as a whole
    drop_early_turns    the oldest exchanges are left off until the rest fits
    split_turns         windows of exchanges become examples of their own, each as many exchanges as fit
    truncate            ids are cut at max_seq_len, mostly in mid-answer: what is cut off, its stop tokens too, is gone

An exchange is a user message and all that follows up to the next one, so a tool's result is never parted from its call.
The system message and the tools stay with every part. With a system message S, exchanges a to e, and room for three:

    drop_early_turns    S c d e            a and b are lost
    split_turns         S a b c | S d e    nothing is lost, but d and e have less before them than inference would feed

Where a template makes several examples of a row, those that fit stay as they are. A document has no exchanges:
`split_turns` cuts it into pieces that follow each other, and `drop_early_turns` refuses it.
"""

import bisect
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from sft_jax.data.errors import RowError
from sft_jax.data.example_builder import RenderedExample
from sft_jax.data.rendering import Renderer
from sft_jax.datatypes import Conversation, Document, Message, Origin, TokenizedExample


@dataclass(frozen=True, slots=True)
class Lost:
    """What a policy took from a row, against the row's untouched rendering."""

    turns: int = 0
    """Supervised turns that are in no example, or of which not the stop token is."""
    tokens: int = 0
    """Positions, as `len(example)` counts them. Of messages left off: the length of the untouched rendering less that
    of one without them."""
    supervised_tokens: int = 0
    """Those of them with a weight other than 0."""

    def __add__(self, other: "Lost") -> "Lost":
        return Lost(
            self.turns + other.turns,
            self.tokens + other.tokens,
            self.supervised_tokens + other.supervised_tokens,
        )


_NOTHING_LOST = Lost()
_FRAME = 20
"""Characters that a template writes around a message, about."""


class FitResult(NamedTuple):
    examples: list[TokenizedExample]
    lost: Lost
    is_changed: bool
    """Whether a policy made them: they are not the rendering as it stands, even if nothing was lost."""
    turns: int
    """Supervised turns in the examples, each through its stop token."""
    supervised_tokens: int
    """In the examples: positions with a weight other than 0."""
    counts: Mapping[str, int]
    """Of the untouched rendering; see `RenderedRow`."""


class OverLongError(RowError):
    """A row that no policy makes fit, and what is lost with it."""

    def __init__(self, origin: Origin, message: str, lost: Lost):
        super().__init__("too_long", origin, message)
        self.lost = lost


def fit_examples(
    row: Conversation | Document,
    renderer: Renderer,
    max_seq_len: int,
    policy: str,
    *,
    supervise: str = "all",
    averaging: str = "token",
) -> FitResult:
    """Render a row into examples that fit.

    Args:
      policy: `config.data.too_long`; the module's text has them.
      supervise: `config.data.supervise`, by which the renderer chooses turns: a part of a row has another last turn
        than the row, and is trained as the row would be.
      averaging: `config.data.averaging`; with `example`, an example that is cut keeps the sum of its weights.

    Raises:
      OverLongError: `too_long`, nothing of the row fits, or no answer's token is left by `truncate`.
      RowError: whatever the renderer finds; `nothing_supervised`, there was none to begin with.
    """
    rendered, counts = renderer.render_row(row)
    examples = [one.example for one in rendered]
    longest = num_turns = num_supervised = 0
    for example, turns, _ in rendered:
        num_before = num_supervised
        num_supervised += _count_supervised(example)
        if num_supervised == num_before:
            # So every example has a supervised token, hence every row that is not padding, hence every batch.
            raise RowError("nothing_supervised", row.origin, "has no token to train on. Remove the row.")
        longest = max(longest, len(example))
        num_turns += len(turns)
    if longest <= max_seq_len:
        return FitResult(examples, _NOTHING_LOST, False, num_turns, num_supervised, counts)

    fitted, lost = [], Lost()
    if isinstance(row, Conversation) and policy in ("drop_early_turns", "split_turns"):
        parts = _parts_of(_pin_weights(row, supervise), [one.turns for one in rendered], renderer)
        for example, part in zip(examples, parts, strict=True):
            kept, gone = [example], Lost()
            if len(example) > max_seq_len:
                kept, gone = _fit_part(example, part, max_seq_len, policy)
            fitted += kept
            lost += gone
    elif policy in ("split_turns", "truncate"):
        for one in rendered:
            example = one.example
            starts = range(0, len(example), max_seq_len) if policy == "split_turns" else [0]
            pieces = [_cut(example, start, start + max_seq_len, averaging) for start in starts]
            kept = [piece for piece in pieces if _has_answer(piece, one.answers)]
            fitted += kept
            lost += _lost_of(one, sum(map(len, kept)))
    if not fitted:
        raise _refuse(row.origin, rendered, max_seq_len, policy)
    num_supervised = sum(map(_count_supervised, fitted))
    return FitResult(fitted, lost, True, num_turns - lost.turns, num_supervised, counts)


def _count_supervised(example: TokenizedExample) -> int:
    return int(np.count_nonzero(example.loss_weights))


def _refuse(origin: Origin, rendered: Sequence[RenderedExample], max_seq_len: int, policy: str) -> OverLongError:
    lost = sum((_lost_of(one, 0) for one in rendered), Lost())
    what = f"is {max(len(one.example) for one in rendered):,} tokens long; config.data.max_seq_len is {max_seq_len:,}"
    if policy == "error":
        remedy = "Raise it, shorten the row, or set config.data.too_long = 'drop'."
        return OverLongError(origin, f"{what}. {remedy}", lost)
    if policy == "truncate":
        what = f"{what}, and no token to train on comes before that"
    elif policy != "drop":
        what = (
            f"{what}, for which {'its last exchange' if policy == 'drop_early_turns' else 'each exchange'} is too long"
        )
    return OverLongError(origin, f"{what}. Raise it, or shorten the row.", lost)


# --- Cutting ids ------------------------------------------------------------------------------------------------------


def _cut(example: TokenizedExample, start: int, stop: int, averaging: str) -> TokenizedExample:
    """Positions [start, stop) of an example. They are predicted as before, from less where `start` is not 0."""
    span = slice(start, stop)
    weights = example.loss_weights[span]
    if averaging == "example" and weights.any():
        weights = weights * (example.loss_weights.sum() / weights.sum())
    return TokenizedExample(example.inputs[span], example.targets[span], weights, example.origin)


def _has_answer(piece: TokenizedExample, answers: Sequence[tuple[int, int]]) -> bool:
    """Whether something is trained on in the beginning of an example: of a conversation, in its answers. A weight of
    prompts alone makes no example."""
    spans = answers or ((0, len(piece)),)
    return any(piece.loss_weights[start:stop].any() for start, stop in spans)


def _lost_of(rendered: RenderedExample, kept: int) -> Lost:
    """What stands behind the first `kept` positions: of turns, those whose stop token does."""
    example = rendered.example
    num_turns = sum(stop > kept for _, stop in rendered.answers)
    return Lost(num_turns, len(example) - kept, int(np.count_nonzero(example.loss_weights[kept:])))


# --- Leaving off exchanges --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Part:
    """The messages that one example was made of. Turns that are not that example's have weight 0."""

    conversation: Conversation
    renderer: Renderer
    head: Sequence[Message]  # system messages
    exchanges: Sequence[Sequence[Message]]

    @classmethod
    def of(cls, conversation: Conversation, renderer: Renderer) -> "_Part":
        messages = conversation.messages
        num_head = next((i for i, message in enumerate(messages) if message.role != "system"), len(messages))
        exchanges: list[list[Message]] = []
        for i in range(num_head, len(messages)):
            opens = messages[i].role == "user" and messages[i - 1].role != "user"
            if opens or i == num_head:
                exchanges.append([])
            exchanges[-1].append(messages[i])
        return cls(conversation, renderer, messages[:num_head], exchanges)

    def render(self, exchanges: Sequence[Sequence[Message]]) -> list[TokenizedExample]:
        """The examples of some of the exchanges; none where none is supervised."""
        if not any(map(_num_supervised, exchanges)):
            return []
        messages = (*self.head, *(message for exchange in exchanges for message in exchange))
        return self.renderer.render(self.conversation._replace(messages=messages))


def _num_supervised(messages: Sequence[Message]) -> int:
    return sum(message.role == "assistant" and message.loss_weight != 0 for message in messages)


def _pin_weights(conversation: Conversation, supervise: str) -> Conversation:
    """The same conversation, in which turns that are not supervised have weight 0 in so many words."""
    last = max(i for i, message in enumerate(conversation.messages) if message.role == "assistant")

    messages = []
    for i, message in enumerate(conversation.messages):
        left_out = (supervise == "last" and i != last) or (supervise == "weighted" and message.loss_weight is None)
        pinned = message.role == "assistant" and left_out
        messages.append(message._replace(loss_weight=0.0) if pinned else message)
    return conversation._replace(messages=tuple(messages))


def _parts_of(conversation: Conversation, turns: Sequence[Sequence[int]], renderer: Renderer) -> list[_Part]:
    """The part of each example, by the turns that it supervises."""
    if len(turns) == 1:
        return [_Part.of(conversation, renderer)]
    messages = conversation.messages
    untrained = [message._replace(loss_weight=0.0) if message.role == "assistant" else message for message in messages]
    parts = []
    for own in turns:
        pinned = untrained[: own[-1] + 1]
        for i in own:
            pinned[i] = messages[i]
        parts.append(_Part.of(conversation._replace(messages=tuple(pinned)), renderer))
    return parts


def _fit_part(
    example: TokenizedExample, part: _Part, max_seq_len: int, policy: str
) -> tuple[list[TokenizedExample], Lost]:
    """The examples that take the place of one that is too long."""
    supervised = [i for i, exchange in enumerate(part.exchanges) if _num_supervised(exchange)]
    window = _Window(part, max_seq_len, len(example))
    windows = (_last_window if policy == "drop_early_turns" else _windows)(supervised, window)
    pieces = [window.render(start, stop) for start, stop in windows]
    fitted = [one for piece in pieces for one in piece]

    kept = {i for start, stop in windows for i in range(start, stop)}
    rest = fitted
    if len(windows) > 1:
        rest = part.render([exchange for i, exchange in enumerate(part.exchanges) if i in kept])
    turns = sum(_num_supervised(exchange) for i, exchange in enumerate(part.exchanges) if i not in kept)
    tokens = len(example) - sum(map(len, rest))
    supervised_tokens = _count_supervised(example) - sum(map(_count_supervised, rest))
    # Not below 0: a prompt may be weighted where it opens an example, and not behind a history that is left off.
    return fitted, Lost(turns, max(0, tokens), max(0, supervised_tokens))


class _Window:
    """Exchanges [start, stop) of a part: their rendering, and guesses at which fit, so that few are rendered."""

    def __init__(self, part: _Part, max_seq_len: int, num_tokens: int):
        """`num_tokens`: of the part as a whole."""
        self._part, self._max_seq_len = part, max_seq_len
        self._rendered: dict[tuple[int, int], list[TokenizedExample]] = {}
        sizes = [_num_characters(messages) for messages in (part.head, *part.exchanges)]
        self._ends = [0, *itertools.accumulate(sizes[1:])]
        self._room = max_seq_len * sum(sizes) / num_tokens - sizes[0]

    def render(self, start: int, stop: int) -> list[TokenizedExample]:
        key = (start, stop)
        if key not in self._rendered:
            self._rendered[key] = self._part.render(self._part.exchanges[start:stop])
        return self._rendered[key]

    def fits(self, start: int, stop: int) -> bool:
        return all(len(example) <= self._max_seq_len for example in self.render(start, stop))

    def first_start(self, lowest: int, highest: int, stop: int) -> int:
        """The least start with which it fits; with `highest` it does."""
        guess = bisect.bisect_left(self._ends, self._ends[stop] - self._room)
        return _first_true(lowest, highest, guess, lambda start: self.fits(start, stop))

    def count_stops(self, start: int, stops: Sequence[int]) -> int:
        """With how many of the ascending stops it fits."""
        guess = bisect.bisect_right([self._ends[stop] for stop in stops], self._ends[start] + self._room)
        return _first_true(0, len(stops), guess, lambda k: not self.fits(start, stops[k]))


def _num_characters(messages: Sequence[Message]) -> int:
    """About as many as a template writes: reasoning is mostly left out of history."""
    calls = sum(len(call.arguments_json) for message in messages for call in message.tool_calls)
    return calls + sum(len(message.content) + _FRAME for message in messages)


def _last_window(supervised: Sequence[int], window: _Window) -> list[tuple[int, int]]:
    """The last supervised exchange, with as many before it as fit."""
    last, stop = supervised[-1], supervised[-1] + 1
    return [(window.first_start(0, last, stop), stop)] if window.fits(last, stop) else []


def _windows(supervised: Sequence[int], window: _Window) -> list[tuple[int, int]]:
    """Windows that hold each supervised exchange which fits, once, and the others that lead up to it if they fit."""
    windows = []
    start, at = 0, 0  # the first exchange that is in no window yet, and the first supervised one
    while at < len(supervised):
        first, stops = supervised[at], [i + 1 for i in supervised[at:]]
        num_fitting = window.count_stops(first, stops)
        if num_fitting:
            stop = stops[num_fitting - 1]
            windows.append((window.first_start(start, first, stop), stop))
        at += max(num_fitting, 1)
        start = supervised[at - 1] + 1
    return windows


def _first_true(lowest: int, highest: int, guess: int, holds: Callable[[int], bool]) -> int:
    """The least number from `lowest` to `highest` that holds, if all above one that does do, and `highest` does.

    Looked for from the guess in steps that double, and then by halving: near a good guess two numbers are tried."""
    step = 1
    at = min(max(guess, lowest), highest)
    if at == highest or holds(at):
        highest = at
        while highest > lowest and holds(max(highest - step, lowest)):
            highest = max(highest - step, lowest)
            step *= 2
        lowest = max(highest - step + 1, lowest)
    else:
        lowest = at + 1
        while lowest < highest and not holds(min(lowest + step - 1, highest)):
            lowest = min(lowest + step, highest)
            step *= 2
        highest = min(lowest + step - 1, highest)
    return lowest + bisect.bisect_left(range(lowest, highest), True, key=holds)
