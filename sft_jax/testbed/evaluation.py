"""Questions and a way to answer them in, scores out: is the fact right, did the answer stop, is it in the format asked.

The right answer is one string, so nothing is judged by a model, and a fact with prose around it is not exact.
"""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from sft_jax.datatypes import Message
from sft_jax.testbed.conversations import Question

Generate = Callable[[Sequence[tuple[Message, ...]]], Sequence[tuple[str, bool]]]
"""Conversations that end with a user's turn -> for each, the answer and whether it ended with the stop token."""

_FORMAT_PATTERNS = {
    "sentence": re.compile(r"[A-Z][^.`\n]*\."),
    "list": re.compile(r"- [^`\n]+(\n- [^`\n]+)*"),
    "block": re.compile(r"```\n([^`\n]+\n)+```"),
}


@dataclass(frozen=True)
class Scores:
    """Fractions of all questions."""

    held_out_exact: float
    """Answers that give exactly the facts asked for, letter by letter, and stop."""
    stop_rate: float
    format_obeyed: float


@dataclass(frozen=True)
class Answered:
    """A question with a model's reply to it."""

    question: Question
    reply: str
    stopped: bool

    @property
    def exact(self) -> bool:
        return self.stopped and self.reply == self.question.answer

    @property
    def format_obeyed(self) -> bool:
        return self.stopped and obeys_format(self.question.format, self.reply)


def obeys_format(format: str, reply: str) -> bool:
    """Whether the whole reply has the format, whatever it says.

    sentence: one line with one full stop, at its end. list: every line begins with "- ". block: lines between fences.
    """
    return _FORMAT_PATTERNS[format].fullmatch(reply) is not None


def read_questions(path: Path) -> list[Question]:
    """What `sft_jax.testbed.make` wrote to questions.jsonl."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [Question(**{**row, "messages": tuple(Message(**message) for message in row["messages"])}) for row in rows]


def answer_questions(questions: Sequence[Question], generate: Generate) -> list[Answered]:
    replies = generate([question.messages for question in questions])
    return [Answered(question, *reply) for question, reply in zip(questions, replies, strict=True)]


def score_answers(answered: Sequence[Answered]) -> Scores:
    count = len(answered)
    return Scores(
        held_out_exact=sum(one.exact for one in answered) / count,
        stop_rate=sum(one.stopped for one in answered) / count,
        format_obeyed=sum(one.format_obeyed for one in answered) / count,
    )


def check_bars(before: Scores, after: Scores) -> list[str]:
    """What the demo promises and these scores do not show; empty when all is well."""
    bars = (
        ("before: stop rate", before.stop_rate <= 0.05, before.stop_rate, "at most 5%"),
        ("before: exact answers", before.held_out_exact <= 0.10, before.held_out_exact, "at most 10%"),
        ("after: exact answers", after.held_out_exact >= 0.90, after.held_out_exact, "at least 90%"),
        ("after: stop rate", after.stop_rate >= 0.99, after.stop_rate, "at least 99%"),
        ("after: format obeyed", after.format_obeyed >= 0.98, after.format_obeyed, "at least 98%"),
    )
    return [f"{name} is {value:.1%}; expected {bar}." for name, met, value, bar in bars if not met]


def write_report(path: Path, before: Scores, after: Scores, train_seconds: float) -> None:
    """`demo_report.json`."""
    report = {"before": asdict(before), "after": asdict(after), "train_seconds": round(train_seconds, 1)}
    path.write_text(json.dumps(report, indent=1) + "\n")
