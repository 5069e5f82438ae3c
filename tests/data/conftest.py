"""Tokenizers for the tests of this room: tiny ones, trained once, and the real ones of the assets."""

import pytest
from tiny_tokenizers import write_byte_level, write_sentencepiece


@pytest.fixture(scope="session")
def tiny_sentencepiece(tmp_path_factory):
    return write_sentencepiece(tmp_path_factory.mktemp("tokenizers") / "sentencepiece")


@pytest.fixture(scope="session")
def tiny_byte_level(tmp_path_factory):
    return write_byte_level(tmp_path_factory.mktemp("tokenizers") / "byte_level")
