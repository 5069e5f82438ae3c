"""The testbed's tokenizer: what goes in comes out, and it is the one that the committed base model was trained with."""

import json

import pytest
import sentencepiece

from sft_jax.testbed.make import BASE_MODEL
from sft_jax.testbed.vocabulary import VOCAB_SIZE, train_tokenizer
from sft_jax.testbed.world import make_world, write_documents


@pytest.fixture(scope="module")
def pieces(testbed):
    return sentencepiece.SentencePieceProcessor(model_file=str(testbed / "tokenizer" / "tokenizer.model"))


def read_texts(path):
    for line in path.read_text().splitlines():
        row = json.loads(line)
        yield from [row["text"]] if "text" in row else [message["content"] for message in row["messages"]]


@pytest.mark.parametrize("name", ["documents", "demonstrations", "held_out", "questions"])
def test_text_comes_back_as_it_went_in(testbed, pieces, name):
    for text in read_texts(testbed / f"{name}.jsonl"):
        ids = pieces.encode(text)
        assert pieces.unk_id() not in ids
        assert pieces.decode(ids) == text


@pytest.mark.parametrize("text", ["two  blanks", " a blank at both ends ", "tab\tand\r\nlines\n\n", "ﬁ Å é 日本 🙂"])
def test_nothing_is_normalised(pieces, text):
    assert pieces.decode(pieces.encode(text)) == text


def test_digits_stand_alone_and_chat_tokens_are_unknown(pieces):
    assert pieces.vocab_size() == VOCAB_SIZE
    assert [pieces.id_to_piece(i) for i in range(3)] == ["<unk>", "<s>", "</s>"]
    learned = [pieces.id_to_piece(i) for i in range(VOCAB_SIZE) if not (pieces.is_byte(i) or pieces.is_control(i))]
    assert max(sum(character.isdigit() for character in piece) for piece in learned) == 1
    assert not [piece for piece in learned if "|" in piece]


def test_training_again_gives_the_same_bytes(testbed):
    assert train_tokenizer(write_documents(make_world())) == (testbed / "tokenizer" / "tokenizer.model").read_bytes()


def test_the_committed_base_model_has_this_tokenizer(testbed):
    made = (testbed / "tokenizer" / "tokenizer.model").read_bytes()
    with open(f"{BASE_MODEL}/tokenizer.model", "rb") as file:
        assert file.read() == made
