"""A sentencepiece .model -> text to ids and back, run by sentencepiece itself, with no control token ever from text.

The model is loaded from a copy of its file with two changes that leave every id where it is:

* control tokens that sentencepiece would match in text (type USER_DEFINED, or an ordinary piece that the folder
  declares special) become type CONTROL, which it never matches;
* where the model changes text (it has a table of normalization, or strips spaces), one piece is added at the end,
  `SENTINEL`, which no merge can join. What follows it in a text is encoded as a continuation: without the dummy prefix,
  but with every other rule of the model in force:

    encode("Hello")              -> ▁Hello
    encode(SENTINEL + "Hello")   -> ▁ SENTINEL | H ello
    encode(SENTINEL + " Hello")  -> ▁ SENTINEL | ▁Hello

  Models that take text as it is, such as Llama's, encode with a copy that has no dummy prefix: a continuation as it
  stands, any other text behind a space of our own.

Normalization is the model's own: one with `nmt_nfkc` folds a newline into a space, and that is what it was trained on.
"""

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
from google.protobuf.message import DecodeError
from sentencepiece import sentencepiece_model_pb2 as pb

from sft_jax.data.control_tokens import ControlToken, is_text
from sft_jax.data.sentencepiece_words import Words, open_words
from sft_jax.datatypes import DataError

SENTINEL = "\ue000\ue001"
# protobuf makes these classes at import, where a type checker does not see them.
ModelProto: Any = vars(pb)["ModelProto"]
TrainerSpec: Any = vars(pb)["TrainerSpec"]
Piece: Any = ModelProto.SentencePiece


def parse_sentencepiece(content: bytes, origin: str) -> Any:
    """Raises DataError for bytes that are no sentencepiece model, or one that we cannot run exactly."""
    proto = ModelProto()
    try:
        proto.ParseFromString(content)
    except DecodeError as error:
        raise DataError(f"{origin}: is neither a sentencepiece model nor a tokenizer.json. Fetch it again.") from error
    if not proto.pieces:
        raise DataError(f"{origin}: is a sentencepiece model without pieces. Fetch it again.")
    if proto.trainer_spec.treat_whitespace_as_suffix:
        what = "marks words by a suffix (treat_whitespace_as_suffix), which is not supported"
        raise DataError(f"{origin}: {what}. Use the same model's tokenizer.json, if it has one.")
    return proto


def sentencepiece_control_tokens(proto: Any) -> list[ControlToken]:
    """The control tokens that the file itself declares: <unk>, CONTROL, and USER_DEFINED pieces that are not spaces."""
    kinds = (Piece.UNKNOWN, Piece.CONTROL, Piece.USER_DEFINED)
    return [
        ControlToken(piece.piece, i, special=piece.type != Piece.USER_DEFINED)
        for i, piece in enumerate(proto.pieces)
        if piece.type in kinds and not is_text(piece.piece)
    ]


class SentencePieceModel:
    """Text <-> ids without control tokens."""

    def __init__(self, proto: Any, control: Iterable[ControlToken], origin: str):
        """`control` are all control tokens; those past the end of the file are appended to it, in order of id.

        Raises:
          DataError: a control token's id is not where its text is in the file, or leaves a gap after it.
        """
        self.proto = ModelProto()
        self.proto.CopyFrom(proto)
        for token in sorted(control, key=lambda token: token.id):
            if token.id == len(self.proto.pieces):
                self.proto.pieces.add(piece=token.text, score=0.0, type=Piece.CONTROL)
            elif token.id > len(self.proto.pieces) or self.proto.pieces[token.id].piece != token.text:
                raise DataError(
                    f"{origin}: {token.text!r} is declared as id {token.id}, and the sentencepiece model of "
                    f"{len(proto.pieces)} pieces has another there. Mend the folder's files."
                )
        self.num_ids = len(self.proto.pieces)
        self.adds_prefix = self.proto.normalizer_spec.add_dummy_prefix

        running = ModelProto()
        running.CopyFrom(self.proto)
        for token in control:
            if running.pieces[token.id].type in (Piece.NORMAL, Piece.USER_DEFINED):
                running.pieces[token.id].type = Piece.CONTROL
        self._sentinel_id = self.num_ids
        self._changes_text = bool(
            running.normalizer_spec.precompiled_charsmap or running.normalizer_spec.remove_extra_whitespaces
        )
        if self._changes_text:
            running.pieces.add(piece=SENTINEL, score=0.0, type=Piece.USER_DEFINED)
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=running.SerializeToString())
        running.normalizer_spec.add_dummy_prefix = False
        self._continued = sentencepiece.SentencePieceProcessor(model_proto=running.SerializeToString())
        self.unk_id: int | None = self._processor.unk_id()
        num_bytes = sum(piece.type == Piece.BYTE for piece in running.pieces)
        self.expresses_all = bool(running.trainer_spec.byte_fallback and num_bytes == 256)
        self._words: Words | None = None
        if self.expresses_all and not self._changes_text:
            self._words = open_words(running, self._continued.encode)

    def special_tokens(self) -> dict[str, str]:
        """Role -> text, as the file declares them."""
        ids = {"bos_token": self._processor.bos_id(), "eos_token": self._processor.eos_id()}
        ids |= {"unk_token": self._processor.unk_id(), "pad_token": self._processor.pad_id()}
        return {role: self.proto.pieces[i].piece for role, i in ids.items() if i >= 0}

    def token_id(self, text: str) -> int | None:
        """Id of the piece with exactly this text."""
        i = self._processor.piece_to_id(text)
        return i if i < self.num_ids and self.proto.pieces[i].piece == text else None

    def encode(self, text: str, *, continuation: bool) -> list[int]:
        return np.frombuffer(self.encode_bytes(text, continuation=continuation), np.int32).tolist()

    def encode_bytes(self, text: str, *, continuation: bool) -> bytes:
        """Ids, int32."""
        if not self._changes_text:
            whole = text if continuation or not self.adds_prefix else " " + text
            return self._words.encode(whole) if self._words is not None else self._encode_continued(whole).tobytes()
        if SENTINEL in text:  # a row's own: encoded in two halves, which the model does not match
            before, after = text.split(SENTINEL, 1)
            head = self.encode_bytes(before + SENTINEL[0], continuation=continuation)
            return head + self.encode_bytes(SENTINEL[1:] + after, continuation=True)
        if not continuation:
            return self._processor.encode(text, return_type="numpy").tobytes()
        ids = self._processor.encode(SENTINEL + text, return_type="numpy")
        return ids[np.flatnonzero(ids == self._sentinel_id)[0] + 1 :].tobytes()

    def _encode_continued(self, text: str) -> np.ndarray:
        return self._continued.encode(text, return_type="numpy")

    def decode(self, ids: list[int], *, continuation: bool) -> str:
        if not self._changes_text:
            return (self._continued if continuation else self._processor).decode(ids)
        if not continuation:
            return self._processor.decode(ids)
        return self._processor.decode([self._sentinel_id, *ids]).removeprefix(SENTINEL)

    def fingerprint(self) -> str:
        return hashlib.sha256(self.proto.SerializeToString(deterministic=True)).hexdigest()

    def save(self, folder: Path) -> None:
        (folder / "tokenizer.model").write_bytes(self.proto.SerializeToString())
