"""Encoding word by word gives what sentencepiece gives for the whole text, or is not done."""

import json
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizers import train_sentencepiece

from sft_jax.data.sentencepiece_model import ModelProto
from sft_jax.data.sentencepiece_words import Words, open_words

USER_DEFINED = ["▁▁▁▁", "▁▁", "\n\n", "\t\t", "--"]
ATOMS = [
    *" ▁\n\t.,!-<>0é中😀\r\0\u200b",
    "  ",
    "\n\n",
    "clips",
    " clips",
    "Natal",
    "--",
    "<s>",
    "<0x41>",
    "▁the",
    "\ue000",
]
TEXTS = st.one_of(st.text(max_size=40), st.lists(st.sampled_from(ATOMS), max_size=40).map("".join))


def parse(content: bytes):
    proto = ModelProto.FromString(content)
    proto.normalizer_spec.add_dummy_prefix = False
    return proto


def open_both(proto) -> tuple[Words, sentencepiece.SentencePieceProcessor]:
    """(words, sentencepiece itself)."""
    whole = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
    words = open_words(proto, whole.encode)
    assert words is not None
    return words, whole


def ids_of(words: Words, text: str) -> list[int]:
    return np.frombuffer(words.encode(text), np.int32).tolist()


BOTH = {
    "plain": open_both(parse(train_sentencepiece())),
    "user_defined": open_both(parse(train_sentencepiece(user_defined_symbols=USER_DEFINED))),
    "digits_alone": open_both(parse(train_sentencepiece(split_digits=True, user_defined_symbols=["$"]))),
    "joins_marks": open_both(parse(train_sentencepiece(user_defined_symbols=["s.", "▁!", "é,"]))),
    "joins_newlines": open_both(parse(train_sentencepiece(user_defined_symbols=["\nclips", "▁\n"]))),
}


@pytest.mark.parametrize("name", BOTH)
@settings(max_examples=300, deadline=None)
@given(text=TEXTS)
def test_words_give_the_ids_of_the_text(name: str, text: str) -> None:
    words, whole = BOTH[name]
    assert ids_of(words, text) == whole.encode(text)
    assert ids_of(words, text) == whole.encode(text)  # remembered


@pytest.mark.parametrize("options", [
    {"model_type": "unigram"},
    {"user_defined_symbols": ["the▁dog"]},
    {"split_by_whitespace": False, "vocab_size": 450},
])  # fmt: skip
def test_a_model_whose_words_depend_on_each_other_is_not_cut(options: dict) -> None:
    assert open_words(parse(train_sentencepiece(**options)), np.array) is None


@pytest.mark.parametrize("name", BOTH)
def test_digits_are_cut_off_where_no_piece_joins_them(name: str) -> None:
    words, _ = BOTH[name]
    words.clear()
    words.encode("sold 48 clips")
    assert ("4" in words) == (name == "digits_alone")


@pytest.mark.parametrize("name", ["plain", "joins_marks"])
def test_marks_are_cut_off_where_no_piece_joins_them(name: str) -> None:
    words, whole = BOTH[name]
    for text, is_joined in (("clips.", True), (" clips,", False), ("é,", True)):
        words.clear()
        assert ids_of(words, text) == whole.encode(text)
        assert (text[:-1] in words) == (name == "plain" or not is_joined)


def test_a_joined_newline_would_be_lost_by_a_cut() -> None:
    words, _ = BOTH["joins_newlines"]
    assert ids_of(words, "a\nclips") != ids_of(BOTH["plain"][0], "a\nclips")
    assert len(ids_of(words, "\nclips")) == 1


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sft_jax.data.sentencepiece_words._MAX_WORDS", 10)
    words, whole = open_both(parse(train_sentencepiece()))
    text = " ".join(f"{i}" for i in range(100)) + " " + "x" * 1000
    assert ids_of(words, text) == whole.encode(text)
    assert len(words) <= 10
    assert max(map(len, words)) <= 64


@pytest.mark.parametrize("name", ["llama2/tokenizer.model", "mistral/mistral_instruct_tokenizer_240323.model.v3"])
def test_real_models_on_real_text(assets: Path, name: str) -> None:
    words, whole = open_both(parse((assets / "tokenizers" / name).read_bytes()))
    for source in sorted(assets.glob("sft/*/*.jsonl")):
        for line in source.read_text().splitlines()[:200]:
            text = json.dumps(json.loads(line), ensure_ascii=False, indent=1)
            assert ids_of(words, text) == whole.encode(text)
