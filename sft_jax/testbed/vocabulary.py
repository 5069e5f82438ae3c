"""Documents -> the folder of a sentencepiece tokenizer in Llama's manner, as transformers reads it.

The vocabulary comes from the documents alone. Text comes back as it went in: no normalisation, no blank removed,
and a character without a piece, such as the newline or the fence's backtick, is spelt in bytes. There is no chat token:
a base model that learns a chat template gets them by `data.new_tokens`.
"""

import io
import json
from collections.abc import Iterable
from pathlib import Path

import sentencepiece

VOCAB_SIZE = 1900
_REQUIRED_CHARS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,:?-"
"""Have a piece whatever the documents say; every other character may be spelt in bytes."""


def train_tokenizer(documents: Iterable[str]) -> bytes:
    """Train a BPE model with byte fallback. Equal documents give equal bytes.

    Returns:
      The content of a `tokenizer.model`; ids 0, 1, 2 are <unk>, <s>, </s>.
    """
    model = io.BytesIO()
    # The trainer takes lines: a newline is no part of any piece.
    lines = (line for document in documents for line in document.split("\n"))
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=lines,
        model_writer=model,
        model_type="bpe",
        vocab_size=VOCAB_SIZE,
        byte_fallback=True,
        character_coverage=1.0,
        required_chars=_REQUIRED_CHARS,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        split_digits=True,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def save_tokenizer(model: bytes, folder: Path) -> None:
    """Write `tokenizer.model` and what transformers asks for beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(model)
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    config = {"tokenizer_class": "LlamaTokenizer", "legacy": False, "add_bos_token": False, "add_eos_token": False}
    for name, content in (("special_tokens_map", names), ("tokenizer_config", {**config, **names})):
        (folder / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")
