"""A tokenizer.json -> text to ids and back, run by the `tokenizers` library, with no control token ever from text.

The library is given a copy of the file in which control tokens have other names, so that no text can become one. Where
the file puts a prefix before text (sentencepiece's `▁`, in one of the four spellings known here), a second copy without
it encodes continuations. Normalization and splitting stay the file's own.
"""

import copy
import functools
import hashlib
import json
import string
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers.pre_tokenizers import ByteLevel

from sft_jax.data.control_tokens import ControlToken, control_token_from_json, control_tokens_to_json, is_text
from sft_jax.data.tokenizer_files import write_json
from sft_jax.datatypes import DataError

TEXT_START = r"\A"  # how the prefix rule that we write ourselves begins: see sentencepiece_export.py
_HIDDEN = "\ue000\ue001"  # begins the names under which control tokens are hidden; `encode` passes no such text on


def json_control_tokens(spec: dict[str, Any]) -> list[ControlToken]:
    """The added tokens of a tokenizer.json that are not runs of spaces."""
    tokens = [control_token_from_json(fields, fields["id"]) for fields in spec.get("added_tokens") or ()]
    return [token for token in tokens if not is_text(token.text)]


def vocabulary(spec: dict[str, Any]) -> dict[str, int]:
    """Text -> id of the file's model, added tokens included."""
    vocab = spec["model"]["vocab"]
    ids = dict(vocab) if isinstance(vocab, dict) else {piece: i for i, (piece, _) in enumerate(vocab)}
    return ids | {fields["content"]: fields["id"] for fields in spec.get("added_tokens") or ()}


def restarting_tokens(spec: dict[str, Any], control: Iterable[ControlToken]) -> frozenset[int]:
    """Ids of the control tokens after which this file puts its prefix before text again.

    The library cuts at control tokens first and then prefixes each piece, except that `Metaspace` may be told to look
    only at the very start, and that tokens flagged `normalized` are cut out after a prefixing normalizer has run.
    """
    ids = {token.id for token in control}
    restarting: set[int] = set()
    for step in _steps(spec):
        match step:
            case {"type": "Replace"} if _is_prefix(step):
                normalized = {f["id"] for f in spec.get("added_tokens") or () if f["normalized"]}
                restarting |= ids - normalized
            case {"type": "Metaspace", "prepend_scheme": "first"}:
                pass
            case _ if _is_prefix(step):
                restarting |= ids
    return frozenset(restarting)


def _steps(spec: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Every normalizer and pre-tokenizer of the file, sequences unrolled."""
    for step in (spec.get("normalizer"), spec.get("pre_tokenizer")):
        if step and step["type"] == "Sequence":
            yield from step.get("normalizers") or step.get("pretokenizers") or ()
        elif step:
            yield step


def _is_prefix(step: dict[str, Any]) -> bool:
    match step:
        case {"type": "Prepend"}:
            return True
        case {"type": "Replace", "pattern": {"Regex": regex}}:
            return regex.startswith(TEXT_START)
        case {"type": "Metaspace"}:
            return step.get("prepend_scheme", "always") != "never" and step.get("add_prefix_space", True)
        case {"type": "ByteLevel"}:
            return step.get("add_prefix_space", False)
    return False


def _without_prefix(spec: dict[str, Any]) -> dict[str, Any]:
    spec = copy.copy(spec)
    for kind, items in (("normalizer", "normalizers"), ("pre_tokenizer", "pretokenizers")):
        step = spec.get(kind)
        if not step:
            continue
        if step["type"] == "Sequence":
            spec[kind] = {"type": "Sequence", items: [s for s in map(_remove_prefix, step[items]) if s]}
        else:
            spec[kind] = _remove_prefix(step)
    return spec


def _remove_prefix(step: dict[str, Any]) -> dict[str, Any] | None:
    if not _is_prefix(step):
        return step
    if step["type"] == "Metaspace":
        return {key: value for key, value in step.items() if key != "add_prefix_space"} | {"prepend_scheme": "never"}
    return step | {"add_prefix_space": False} if step["type"] == "ByteLevel" else None


class JsonModel:
    """Text <-> ids without control tokens."""

    def __init__(self, spec: dict[str, Any], control: Iterable[ControlToken], origin: str):
        """`spec` is the parsed tokenizer.json; `control` are all control tokens, new ones included.

        Raises:
          DataError: the library does not take the file, or text could vanish in it without an unknown token.
        """
        self.spec = spec
        self.origin = origin
        self.control = sorted(control, key=lambda token: token.id)
        self._vocabulary = vocabulary(spec)
        self.num_ids = max([*self._vocabulary.values(), *(token.id for token in self.control)]) + 1
        running = _without_control(spec, {token.text for token in self.control})
        self.adds_prefix = any(map(_is_prefix, _steps(spec)))
        try:
            self._fresh = tokenizers.Tokenizer.from_str(json.dumps(running))
            self._continued = self._fresh
            if self.adds_prefix:
                self._continued = tokenizers.Tokenizer.from_str(json.dumps(_without_prefix(running)))
        except Exception as error:  # the library raises no narrower type
            raise DataError(
                f"{origin}: the tokenizers library does not read it: {error}. Fetch the file again."
            ) from error
        self.unk_id = _unknown_id(spec)
        self.expresses_all = self.unk_id is None
        if self.unk_id is None:
            _check_coverage(spec, origin)

    def special_tokens(self) -> dict[str, str]:
        return {}  # a tokenizer.json gives its tokens no roles

    def token_id(self, text: str) -> int | None:
        """Id of the token with exactly this text."""
        return self._vocabulary.get(text)

    def encode(self, text: str, *, continuation: bool) -> list[int]:
        if _HIDDEN in text:  # a row's own: encoded in two halves
            before, after = text.split(_HIDDEN, 1)
            head = self.encode(before + _HIDDEN[0], continuation=continuation)
            return head + self.encode(_HIDDEN[1:] + after, continuation=True)
        model = self._continued if continuation else self._fresh
        return model.encode_batch_fast([text], add_special_tokens=False)[0].ids  # without offsets: a sixth faster

    def encode_bytes(self, text: str, *, continuation: bool) -> bytes:
        """Ids, int32."""
        return array("i", self.encode(text, continuation=continuation)).tobytes()

    def decode(self, ids: list[int], *, continuation: bool) -> str:
        if not continuation or not self.adds_prefix:
            return self._fresh.decode(ids, skip_special_tokens=False)
        anchor, before = self._anchor()
        return self._fresh.decode([*before, *ids], skip_special_tokens=False).removeprefix(anchor)

    def _anchor(self) -> tuple[str, list[int]]:
        """A text to decode in front of others, so that no space is stripped from theirs."""
        for anchor in string.ascii_letters + string.digits:
            ids = self.encode(anchor, continuation=True)
            if self._fresh.decode(ids, skip_special_tokens=False) == anchor:
                return anchor, ids
        raise DataError(
            f"{self.origin}: expresses no ASCII letter or digit, so parts of a text cannot be decoded. Use another."
        )

    def fingerprint(self) -> str:
        return hashlib.sha256(json.dumps(self.spec, sort_keys=True).encode()).hexdigest()

    def normalized_control(self) -> set[int]:
        """Ids of the control tokens that the saved file matches after its normalizer.

        With a `Prepend` none may be: it would match them only after a `▁`, and swallow it.
        """
        if any(step["type"] == "Prepend" for step in _steps(self.spec)):
            return set()
        return {fields["id"] for fields in self.spec.get("added_tokens") or () if fields["normalized"]}

    @staticmethod
    def adds_bos(spec: dict[str, Any], bos_id: int) -> bool:
        """Whether the file's post-processor puts BOS before a text."""
        return tokenizers.Tokenizer.from_str(json.dumps(spec)).encode("a").ids[:1] == [bos_id]

    def saved_spec(self) -> dict[str, Any]:
        """The tokenizer.json that `save` writes: the file with every control token as an added token."""
        known = {token.text for token in self.control}
        texts = [fields for fields in self.spec.get("added_tokens") or () if fields["content"] not in known]
        entries = texts + control_tokens_to_json(self.control, self.normalized_control())
        return self.spec | {"added_tokens": sorted(entries, key=lambda fields: fields["id"])}

    @functools.cached_property
    def _whole(self) -> tokenizers.Tokenizer:
        return tokenizers.Tokenizer.from_str(json.dumps(self.saved_spec()))

    def encode_whole(self, text: str) -> list[int]:
        """As whoever loads the saved file does: control tokens in `text` become control ids."""
        return self._whole.encode(text, add_special_tokens=False).ids

    def save(self, folder: Path) -> None:
        """Write tokenizer.json.

        Raises:
          DataError: the library gives a control token another id than it has here.
        """
        for token in self.control:
            if self._whole.token_to_id(token.text) != token.id:
                raise DataError(
                    f"{self.origin}: {token.text!r} is id {token.id}, and the saved tokenizer.json would give it "
                    f"{self._whole.token_to_id(token.text)}: its ids have gaps. Close them before adding tokens."
                )
        write_json(folder / "tokenizer.json", self.saved_spec())


def _without_control(spec: dict[str, Any], control: set[str]) -> dict[str, Any]:
    """A copy of the file in which no text becomes one of `control`, with no truncation and no padding.

    Control tokens are renamed, not taken out: the library numbers added tokens by how many there are.
    """
    model = dict(spec["model"])
    pieces = set(model["vocab"]) if isinstance(model["vocab"], dict) else {piece for piece, _ in model["vocab"]}
    unknown = {model["unk_token"]} & pieces if model.get("unk_token") else set()  # the model finds it by its name
    hidden = {text: f"{_HIDDEN}{i}" for i, text in enumerate(sorted(control - unknown))}
    if isinstance(model["vocab"], dict):
        model["vocab"] = {hidden.get(piece, piece): i for piece, i in model["vocab"].items()}
    else:
        model["vocab"] = [[hidden.get(piece, piece), score] for piece, score in model["vocab"]]
    if "merges" in model and hidden.keys() & pieces:
        pairs = [tuple(m.split(" ", 1)) if isinstance(m, str) else tuple(m) for m in model["merges"]]
        model["merges"] = [list(pair) for pair in pairs if not hidden.keys() & {*pair, "".join(pair)}]
    added = [
        fields | ({"content": hidden[fields["content"]], "normalized": False} if fields["content"] in hidden else {})
        for fields in spec.get("added_tokens") or ()
        if fields["content"] not in unknown
    ]
    unused = dict.fromkeys(("post_processor", "truncation", "padding"))
    return spec | {"added_tokens": added, "model": model} | unused


def _unknown_id(spec: dict[str, Any]) -> int | None:
    model = spec["model"]
    if model.get("unk_id") is not None:
        return model["unk_id"]
    return vocabulary(spec).get(model["unk_token"]) if model.get("unk_token") else None


def _check_coverage(spec: dict[str, Any], origin: str) -> None:
    """Without an unknown token, what the vocabulary lacks vanishes: so it must express every byte."""
    vocab = vocabulary(spec)
    if spec["model"].get("byte_fallback"):
        alphabet = [f"<0x{byte:02X}>" for byte in range(256)]
    else:
        alphabet = sorted(ByteLevel.alphabet())  # GPT-2's character for each byte
    byte_level = spec["model"].get("byte_fallback") or any(step["type"] == "ByteLevel" for step in _steps(spec))
    missing = [piece for piece in alphabet if piece not in vocab or not byte_level]
    if missing:
        raise DataError(
            f"{origin}: has no unknown token and lacks {len(missing)} of 256 bytes (the first is {missing[0]!r}), "
            "so text could vanish. Give its model an unk_token, or all bytes."
        )
