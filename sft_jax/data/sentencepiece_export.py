"""A sentencepiece model -> the tokenizer.json that says the same, or nothing where none does.

transformers 5 rebuilds a bare `.model` with merges ordered by piece id where sentencepiece orders them by score, so
that a tenth of ordinary texts come out differently. It takes a tokenizer.json as it stands. So one is built here for
models of Llama's kind (BPE, text kept as it is), and used only if it agrees with sentencepiece on thousands of texts.

The dummy prefix `▁` is put by a rule of our own, because the library's `Prepend` would repeat it after every control
token. Control tokens that restart the text (BOS) are cut out before the normalizer runs; the others after it, and the
rule leaves a text that begins with one of those alone:

    <s>Hi<|im_end|>Hi   ->   <s> | ▁Hi <|im_end|> Hi
"""

import itertools
import random
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from sft_jax.data.control_tokens import ControlToken, control_tokens_to_json
from sft_jax.data.json_model import TEXT_START
from sft_jax.data.sentencepiece_model import Piece, TrainerSpec
from sft_jax.data.tokenizer_sample import SAMPLE


def sentencepiece_to_json(
    proto: Any, control: Iterable[ControlToken], restarting: Iterable[int], bos_token: str
) -> dict[str, Any] | None:
    """tokenizer.json as a dict, or None for another kind of model.

    Args:
      proto: with every control token in it.
      restarting: ids of the control tokens after which the dummy prefix is put again.
      bos_token: written before plain texts by whoever asks for special tokens; empty: none.
    """
    control = sorted(control, key=lambda token: token.id)
    normalized = {token.id for token in control} - set(restarting)
    changes_text = proto.normalizer_spec.precompiled_charsmap or proto.normalizer_spec.remove_extra_whitespaces
    if proto.trainer_spec.model_type != TrainerSpec.BPE or changes_text:
        return None
    names = {token.text for token in control}
    spaces = [
        ControlToken(piece.piece.replace("▁", " "), i, special=False)
        for i, piece in enumerate(proto.pieces)
        if piece.type == Piece.USER_DEFINED and piece.piece not in names
    ]
    added = control_tokens_to_json(control, normalized) + control_tokens_to_json(spaces)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": sorted(added, key=lambda fields: fields["id"]),
        "normalizer": _normalizer(proto, [token.text for token in control if token.id in normalized]),
        "pre_tokenizer": None,
        "post_processor": _post_processor(bos_token, control) if bos_token else None,
        "decoder": _decoder(proto),
        "model": _bpe_model(proto),
    }


def _bpe_model(proto: Any) -> dict[str, Any]:
    """Merges by falling score: sentencepiece joins the neighbours whose union scores highest, the leftmost first."""
    vocab = {piece.piece: i for i, piece in enumerate(proto.pieces)}
    scores = {piece.piece: piece.score for piece in proto.pieces if piece.type == Piece.NORMAL}
    merges = [
        (-score, vocab[piece[:k]], vocab[piece[k:]], [piece[:k], piece[k:]])
        for piece, score in scores.items()
        for k in range(1, len(piece))
        if piece[:k] in scores and piece[k:] in scores
    ]
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": proto.pieces[proto.trainer_spec.unk_id].piece,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": True,
        "byte_fallback": proto.trainer_spec.byte_fallback,
        "ignore_merges": False,
        "vocab": vocab,
        "merges": [pair for *_, pair in sorted(merges)],
    }


def _normalizer(proto: Any, matched_later: list[str]) -> dict[str, Any]:
    steps: list[dict[str, Any]] = []
    if proto.normalizer_spec.add_dummy_prefix:
        others = "|".join(map(re.escape, matched_later))
        pattern = f"{TEXT_START}(?!{others})" if others else TEXT_START
        steps.append({"type": "Replace", "pattern": {"Regex": pattern}, "content": "▁"})
    steps.append({"type": "Replace", "pattern": {"String": " "}, "content": "▁"})
    return {"type": "Sequence", "normalizers": steps}


def _decoder(proto: Any) -> dict[str, Any]:
    steps: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if proto.normalizer_spec.add_dummy_prefix:
        steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {"type": "Sequence", "decoders": steps}


def _post_processor(bos_token: str, control: list[ControlToken]) -> dict[str, Any]:
    bos_id = next(token.id for token in control if token.text == bos_token)
    first, second = ([{"SpecialToken": {"id": bos_token, "type_id": n}}, {"Sequence": {"id": c, "type_id": n}}]
                     for n, c in enumerate("AB"))  # fmt: skip
    special = {bos_token: {"id": bos_token, "ids": [bos_id], "tokens": [bos_token]}}
    return {"type": "TemplateProcessing", "single": first, "pair": first + second, "special_tokens": special}


def agrees(encode: Callable[[str], list[int]], reference: Callable[[str], list[int]], proto: Any) -> bool:
    """Whether two encodings are the same on the built-in sample and on 3,000 texts made of the model's own pieces."""
    return all(encode(text) == reference(text) for text in itertools.chain(SAMPLE, _texts_of_pieces(proto, 3000)))


def _texts_of_pieces(proto: Any, count: int) -> Iterator[str]:
    """Texts of up to 12 pieces each, every fourth piece a control token or a space."""
    texts = [
        piece.piece.replace("▁", " ") for piece in proto.pieces if piece.type in (Piece.NORMAL, Piece.USER_DEFINED)
    ]
    marks = [piece.piece for piece in proto.pieces if piece.type == Piece.CONTROL] + [" "]
    draw = random.Random(0)
    for _ in range(count):
        yield "".join(draw.choice(marks if draw.random() < 0.25 else texts) for _ in range(draw.randint(1, 12)))
