"""Small tokenizers of both kinds, trained in a moment, with the traps that the large ones have."""

import io
import json
from pathlib import Path

import sentencepiece
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers
from tokenizers.decoders import ByteLevel as ByteLevelDecoder

SENTENCES = (
    "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May.",
    "How many clips did Natalia sell altogether in April and May? She sold 48 / 2 = 24 clips in May.",
    "The answer is 72. The quick brown fox jumps over the lazy dog, and the dog does not mind at all.",
    "[INST] What is the capital of France? [/INST] The capital of France is Paris.",
    "user assistant system: Hello there! Hi, how are you today? I am fine, thank you.",
)


def train_sentencepiece(**options) -> bytes:
    """A sentencepiece model in Llama's manner: BPE, byte fallback, text kept as it is. `options` change that."""
    model = io.BytesIO()
    defaults = {
        "model_type": "bpe",
        "vocab_size": 400,
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "hard_vocab_limit": False,
        "num_threads": 1,
        "minloglevel": 2,
    }
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(SENTENCES), model_writer=model, **(defaults | options)
    )
    return model.getvalue()


def write_sentencepiece(folder: Path, **options) -> Path:
    """A folder with nothing but the model."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(train_sentencepiece(**options))
    return folder


def write_byte_level(folder: Path) -> Path:
    """A byte-level BPE with ChatML's tokens, a non-special `<think>`, and runs of spaces among its added tokens."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(SENTENCES, trainer)
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer.add_tokens([AddedToken(text, special=True, normalized=False) for text in special])
    tokenizer.add_tokens(
        [AddedToken(text, special=False, normalized=False) for text in ("<think>", "</think>", "    ")]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"eos_token": "<|im_end|>", "pad_token": {"content": "<|endoftext|>"}, "add_bos_token": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def edit_json(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
