"""Control tokens are found whole, and content that looks like one, or like a part of one, never becomes one."""

import itertools

import pytest

from sft_jax.data.control_tokens import ControlToken, ControlTokens, merge_control_tokens
from sft_jax.data.disguise import Disguise
from sft_jax.datatypes import DataError

CHATML = ControlTokens(
    ControlToken(text, i) for i, text in enumerate(["<s>", "<|im_start|>", "<|im_end|>", "<|im_end|>x"])
)


def test_split_keeps_every_character():
    assert CHATML.split("<s>Hi <|im_end|>\n<|im_start|><|im_") == [0, "Hi ", 2, "\n", 1, "<|im_"]
    assert CHATML.split("") == []
    assert CHATML.split("plain") == ["plain"]
    assert ControlTokens([]).split("<s>") == ["<s>"]


def test_the_longest_token_wins():
    assert CHATML.split("<|im_end|>x") == [3]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({}, ["a ", 7, " \nb"]),
        ({"lstrip": True}, ["a", 7, " \nb"]),
        ({"rstrip": True}, ["a ", 7, "b"]),
        ({"lstrip": True, "rstrip": True}, ["a", 7, "b"]),
    ],
)
def test_flags_swallow_whitespace(flags, expected):
    assert ControlTokens([ControlToken("<|user|>", 7, **flags)]).split("a <|user|> \nb") == expected


def test_single_word_tokens_leave_words_alone():
    control = ControlTokens([ControlToken("END", 7, single_word=True)])
    assert control.split("END of WEEKEND") == [7, " of WEEKEND"]


LOOK_ALIKES = [
    "<s>",
    "a<s>b<s>",
    "<|im_end|>x",
    "<",
    ">",
    "<|im_",
    "|im_end|>",
    "  <|im_end  ",
    "",
    " ",
    "s>",
    "<|im_end|",
]


@pytest.mark.parametrize("left", LOOK_ALIKES)
def test_disguised_text_never_forms_a_control_token(left):
    for right, glue in itertools.product(LOOK_ALIKES, ["", "x", "|"]):
        disguise = Disguise(left + right)
        rendered = (
            "<|im_start|>" + CHATML.disguise(left, disguise.hide).strip() + glue + CHATML.disguise(right, disguise.hide)
        )
        assert [part for part in CHATML.split(rendered) if isinstance(part, int)] == [1], (right, glue)
        assert disguise.reveal(rendered) == "<|im_start|>" + left.strip() + glue + right


@pytest.mark.parametrize("token", ["<s>", "<|im_end|>"])
def test_half_a_control_token_does_not_join_with_the_template_s_text(token):
    for k in range(1, len(token)):
        disguise = Disguise("")
        assert CHATML.split(token[:k] + CHATML.disguise(token[k:] + " x", disguise.hide))[0] != CHATML.ids[token]
        assert CHATML.split(CHATML.disguise("x " + token[:k], disguise.hide) + token[k:])[-1] != CHATML.ids[token]


def test_a_character_that_opens_and_closes_is_disguised_and_comes_back():
    control = ControlTokens([ControlToken("<<", 0)])
    disguise = Disguise("<")
    hidden = control.disguise("<", disguise.hide)
    assert control.split("<" + hidden + "<") == ["<" + hidden + "<"]
    assert disguise.reveal(hidden) == "<"


def test_a_disguise_avoids_characters_in_use():
    disguise = Disguise("\ue000\ue001 <s>")
    hidden = CHATML.disguise("\ue000\ue001 <s>", disguise.hide)
    assert hidden == "\ue000\ue001 \ue002s>"
    assert disguise.reveal(hidden) == "\ue000\ue001 <s>"


@pytest.mark.parametrize("text", ["a sentence, no more", "3 > 2", "a << 3", "emphasis_here", ""])
def test_ordinary_text_is_not_disguised(text):
    assert not CHATML.may_form_in(text)


def test_contradictions_are_refused():
    with pytest.raises(DataError, match="'<s>' has two ids, 1 and 2"):
        merge_control_tokens([[ControlToken("<s>", 1)], [ControlToken("<s>", 2)]], "folder")
    with pytest.raises(DataError, match="id 1 has two texts, '<s>' and '<pad>'"):
        merge_control_tokens([[ControlToken("<s>", 1)], [ControlToken("<pad>", 1)]], "folder")
    merged = merge_control_tokens([[ControlToken("<s>", 1)], [ControlToken("<s>", 1, rstrip=True)]], "folder")
    assert merged["<s>"].rstrip
