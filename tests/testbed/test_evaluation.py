"""The judge: right answers pass, near misses do not."""

import io
import json

import pytest
from rich.console import Console

from sft_jax.datatypes import Message
from sft_jax.testbed.conversations import FORMATS, Question, write_questions
from sft_jax.testbed.evaluation import (
    Answered,
    Scores,
    answer_questions,
    check_bars,
    obeys_format,
    score_answers,
    write_report,
)
from sft_jax.testbed.report import choose_samples, print_report
from sft_jax.testbed.world import make_world

QUESTIONS = list(write_questions(make_world()))
GOOD = Scores(held_out_exact=0.9, stop_rate=0.99, format_obeyed=0.98)
NOTHING = Scores(held_out_exact=0.0, stop_rate=0.0, format_obeyed=0.0)


def test_right_answers_pass():
    answered = answer_questions(QUESTIONS, lambda asked: [(question.answer, True) for question in QUESTIONS])
    assert score_answers(answered) == Scores(1.0, 1.0, 1.0)


def test_a_right_answer_that_goes_on_is_wrong():
    answered = answer_questions(QUESTIONS, lambda asked: [(question.answer, False) for question in QUESTIONS])
    assert score_answers(answered) == NOTHING


@pytest.mark.parametrize(
    "reply",
    [
        "The pet of Ku is a goat.",
        "The pet of Ka is a fox.",
        "The pet of Ku is a fox. The trade is law.",
        "The pet of Ku is a fox",
        "the pet of Ku is a fox.",
        "- pet: fox",
        "",
    ],
)
def test_a_near_miss_is_not_exact(reply):
    question = Question((Message("user", "Which pet does Ku keep?"),), "sentence", "The pet of Ku is a fox.", "Ku")
    assert Answered(question, question.answer, True).exact
    assert not Answered(question, reply, True).exact


@pytest.mark.parametrize(
    ("format", "replies"),
    [
        ("sentence", ["The pet of Ku is a fox.", "The trade is law, the pet is a fox and the birthplace is Ashmoor."]),
        ("list", ["- pet: fox", "- pet: fox\n- trade: law"]),
        ("block", ["```\npet: fox\n```", "```\npet: fox\ntrade: law\n```"]),
    ],
)
def test_a_format_is_told_from_the_others(format, replies):
    for reply in replies:
        assert [other for other in FORMATS if obeys_format(other, reply)] == [format]


@pytest.mark.parametrize(
    ("format", "reply"),
    [
        ("sentence", "The pet of Ku is a fox. The trade is law."),
        ("sentence", "The pet of Ku is a fox"),
        ("sentence", "The pet of Ku\nis a fox."),
        ("list", "pet: fox\n- trade: law"),
        ("list", "- pet: fox\ntrade: law"),
        ("list", "- "),
        ("list", "- pet: fox\n"),
        ("block", "```\npet: fox"),
        ("block", "```\n```"),
        ("block", "``` pet: fox ```"),
        ("block", "```\npet: fox\n```\nThat is all."),
    ],
)
def test_a_broken_format_is_refused(format, reply):
    assert not obeys_format(format, reply)


def test_bars():
    assert check_bars(NOTHING, GOOD) == []
    assert check_bars(GOOD, NOTHING) == [
        "before: stop rate is 99.0%; expected at most 5%.",
        "before: exact answers is 90.0%; expected at most 10%.",
        "after: exact answers is 0.0%; expected at least 90%.",
        "after: stop rate is 0.0%; expected at least 99%.",
        "after: format obeyed is 0.0%; expected at least 98%.",
    ]


def test_the_report_has_exactly_these_fields(tmp_path):
    write_report(tmp_path / "demo_report.json", NOTHING, GOOD, 61.234)
    assert json.loads((tmp_path / "demo_report.json").read_text()) == {
        "before": {"held_out_exact": 0.0, "stop_rate": 0.0, "format_obeyed": 0.0},
        "after": {"held_out_exact": 0.9, "stop_rate": 0.99, "format_obeyed": 0.98},
        "train_seconds": 61.2,
    }


def test_samples_show_every_format_and_do_not_look_at_replies():
    after = [Answered(question, question.answer, True) for question in QUESTIONS]
    before = [Answered(question, "Ku keeps a fox. [red]" * 20, False) for question in QUESTIONS]
    chosen = choose_samples(after)
    assert [QUESTIONS[i].format for i in chosen] == list(FORMATS)
    assert chosen == choose_samples(before)
    out = io.StringIO()
    print_report(Console(file=out, width=100), before, after)
    assert "100.0%" in out.getvalue()
    assert "[red]" in out.getvalue()
    for i in chosen:
        assert QUESTIONS[i].answer.split("\n")[0].split(" ")[-1] in out.getvalue()
