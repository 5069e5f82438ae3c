"""A tokenizer's folder or file -> text to ids and back, with control tokens kept apart from text.

`encode` never yields a control token, adds no BOS and no EOS. Who wants control ids cuts a text with `control.split`
and gives the parts to `encode_parts` (rendering.py does, and nobody else):

    <s>[INST] Hi [/INST]   ->   [1, "[INST] Hi [/INST]"]   ->   1, then encode("[INST] Hi [/INST]")

A piece at the start of a text, or after a control token in `restarting`, is encoded as a text of its own; every other
piece is a `continuation`, which gets none of the space pieces that sentencepiece puts before a text.
"""

import dataclasses
import functools
import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sft_jax.data.control_tokens import ControlToken, ControlTokens, is_text, merge_control_tokens
from sft_jax.data.json_model import JsonModel, json_control_tokens, restarting_tokens
from sft_jax.data.sentencepiece_export import agrees, sentencepiece_to_json
from sft_jax.data.sentencepiece_model import SentencePieceModel, parse_sentencepiece, sentencepiece_control_tokens
from sft_jax.data.tokenizer_files import TokenizerFiles, read_tokenizer_files, write_tokenizer_files
from sft_jax.data.tokenizer_sample import SAMPLE
from sft_jax.datatypes import ConfigError, DataError

logger = logging.getLogger(__name__)

_SHORT = 16  # characters

KnownTexts = dict[tuple[str, bool], bytes]
"""Text, and whether it goes on from other text -> its ids."""
TextModel = SentencePieceModel | JsonModel
"""Text <-> ids without control tokens. The two have the same methods."""


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """See the module's text. Made by `load_tokenizer`."""

    origin: str
    model: TextModel
    control: ControlTokens
    restarting: frozenset[int]  # control ids after which text is encoded as a text of its own
    special_tokens: dict[str, str]  # role such as "bos_token" -> text
    adds_bos: bool  # whether plain documents begin with BOS
    chat_template: str  # the folder's own Jinja text, "" where there is none
    spec: dict[str, Any]  # the folder's tokenizer.json, {} where there is none
    config: dict[str, Any]  # the folder's tokenizer_config.json, {} where there is none

    @property
    def vocab_size(self) -> int:
        """Rows that an embedding needs: highest id + 1, added tokens included."""
        return self.model.num_ids

    @property
    def bos_token(self) -> str:
        return self.special_tokens.get("bos_token", "")

    @property
    def eos_token(self) -> str:
        return self.special_tokens.get("eos_token", "")

    @property
    def unk_id(self) -> int | None:
        return self.model.unk_id

    @property
    def control_tokens(self) -> dict[str, int]:
        """Every control, special or added token that is not a run of spaces, by its text."""
        return self.control.ids

    def token_id(self, token: str) -> int | None:
        """Id of a control token by its exact text, else None."""
        return self.control.ids.get(token)

    def encode(self, text: str, *, continuation: bool = False) -> list[int]:
        """Ids of plain text: no BOS or EOS is added, and text that looks like a control token stays text."""
        return self.model.encode(text, continuation=continuation) if text else []

    def decode(self, ids: Sequence[int], *, continuation: bool = False) -> str:
        """Text of ids, control tokens shown as their text.

        Args:
          continuation: `ids` go on from others, so a leading space is theirs and stays.
        """
        out: list[str] = []
        run: list[int] = []
        for token_id in [*ids, None]:
            if token_id is not None and token_id not in self.control.texts:
                run.append(token_id)
                continue
            if run:
                out.append(self.model.decode(run, continuation=continuation))
                run = []
            if token_id is not None:
                out.append(self.control.texts[token_id])
                continuation = token_id not in self.restarting
        return "".join(out)

    def encode_each(
        self, parts: Iterable[int | str], *, continuation: bool = False, known: KnownTexts | None = None
    ) -> list[bytes]:
        """Ids of each part of a text that `control.split` has cut: int32, as bytes, which join faster than arrays.

        Args:
          continuation: the first part goes on from what came before it.
          known: looked into and added to, for texts that come again.
        """
        ids: list[bytes] = []
        for part in parts:
            if isinstance(part, int):
                ids.append(self._control_bytes[part])
                continuation = part not in self.restarting
            elif len(part) <= _SHORT:
                ids.append(self._encode_short(part, continuation))
            elif known is not None:
                text_ids = known.get((part, continuation))
                if text_ids is None:
                    text_ids = known[part, continuation] = self.model.encode_bytes(part, continuation=continuation)
                ids.append(text_ids)
            else:
                ids.append(self.model.encode_bytes(part, continuation=continuation))
        return ids

    @functools.cached_property
    def _control_bytes(self) -> dict[int, bytes]:
        return {token_id: np.array([token_id], np.int32).tobytes() for token_id in self.control.texts}

    @functools.cached_property
    def _encode_short(self) -> Callable[[str, bool], bytes]:
        """Remembers what templates write between control tokens, such as `"\\n"` and `"assistant\\n"`."""
        return functools.lru_cache(maxsize=1024)(lambda text, after: self.model.encode_bytes(text, continuation=after))

    def encode_parts(self, parts: Iterable[int | str]) -> list[int]:
        """Ids of a text that `control.split` has cut, in a row."""
        return np.frombuffer(b"".join(self.encode_each(parts)), np.int32).tolist()

    def fingerprint(self) -> str:
        """sha256, hex, over what determines encoding: model, control tokens, prefix rule, BOS and EOS."""
        tokens = [dataclasses.astuple(token) for token in self.control.tokens]
        parts = [self.model.fingerprint(), tokens, sorted(self.restarting), self.special_tokens, self.adds_bos]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def save(self, folder: str | Path, chat_template: str) -> None:
        """Write a folder that transformers and vLLM load with the same ids, control tokens and template.

        A sentencepiece model is written as its .model, and as a tokenizer.json too where one says exactly the same.

        Args:
          folder: exists already.
          chat_template: Jinja text; empty: the folder gets none.
        """
        folder = Path(folder)
        if isinstance(self.model, SentencePieceModel):
            self.model.save(folder)
        json_form = self._json_form()
        if json_form:
            json_form.save(folder)
            # By this name transformers 4 and 5 run tokenizer.json as it stands; by a model's own, such as
            # LlamaTokenizer, version 5 replaces its normalizer and loses its unknown token.
            kind: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
        else:
            kind = {"tokenizer_class": self.config.get("tokenizer_class", "LlamaTokenizer")}
            logger.warning(
                "%s: no tokenizer.json says the same as its sentencepiece model, so %s has only the .model. "
                "transformers 5 may read that one differently; check before serving with it.",
                self.origin,
                folder,
            )
        defaults = {"add_bos_token": self.adds_bos, "add_eos_token": False, "clean_up_tokenization_spaces": False}
        kept = {key: value for key, value in self.config.items() if key != "auto_map"}
        normalized = json_form.normalized_control() if json_form else set()
        config = defaults | kept | kind
        write_tokenizer_files(folder, config, self.special_tokens, self.control, normalized, chat_template)

    def _json_form(self) -> JsonModel | None:
        """This tokenizer as a tokenizer.json: for a sentencepiece model, one that agrees with it, or None."""
        if isinstance(self.model, JsonModel):
            return self.model
        assert isinstance(self.model, SentencePieceModel)
        bos_token = self.bos_token if self.adds_bos else ""
        built = sentencepiece_to_json(self.model.proto, self.control.tokens, self.restarting, bos_token)
        for spec in filter(None, (self.spec, built)):
            form = JsonModel(spec, self.control.tokens, self.origin)
            if agrees(form.encode_whole, lambda text: self.encode_parts(self.control.split(text)), self.model.proto):
                return form
        return None


def load_tokenizer(path: str | Path, new_tokens: Iterable[str] = ()) -> Tokenizer:
    """Open a tokenizer folder, or one tokenizer file alone.

    Args:
      path: a folder with a sentencepiece model, a tokenizer.json, or both, which must then agree; or one such file,
        told apart by content.
      new_tokens: control tokens to add, one id each, after the vocabulary.

    Raises:
      ConfigError: there is no tokenizer at `path`, or a new token exists already.
      DataError: a file is damaged or of a kind that is not run, or two files contradict each other.
    """
    files = read_tokenizer_files(path)
    proto = None if files.sentencepiece is None else parse_sentencepiece(files.sentencepiece, files.origin)
    own = sentencepiece_control_tokens(proto) if proto else []
    groups = [own, json_control_tokens(files.spec), [token for token in files.added_tokens if not is_text(token.text)]]
    control = merge_control_tokens(groups, files.origin)

    model = _open_model(files, proto, control.values())
    special_tokens = model.special_tokens() | files.special_tokens
    for text in special_tokens.values():  # an ordinary entry of the vocabulary that the folder gives a role
        token_id = model.token_id(text)
        if text not in control and token_id is not None:
            control[text] = ControlToken(text, token_id)
    new_tokens = tuple(new_tokens)
    for i, text in enumerate(new_tokens):
        if is_text(text) or text in new_tokens[:i] or text in control or model.token_id(text) is not None:
            what = "is empty" if is_text(text) else "is there already"
            raise ConfigError(f"config.data.new_tokens[{i}]: {text!r} {what} ({files.origin}). Take it out.")
        control[text] = ControlToken(text, model.num_ids + i)
    model = _open_model(files, proto, control.values())
    if proto and files.spec:
        _check_forms_agree(model, JsonModel(files.spec, control.values(), files.origin), files.origin)

    bos_id = model.token_id(special_tokens.get("bos_token", ""))
    adds_bos = files.config.get("add_bos_token")
    if adds_bos is None:
        adds_bos = bos_id is not None and (JsonModel.adds_bos(files.spec, bos_id) if files.spec else True)
    if files.spec:
        restarting = restarting_tokens(files.spec, control.values())
    else:  # Llama-2's own code encodes a text of its own after each BOS
        restarting = frozenset({bos_id} if bos_id is not None else ())
    return Tokenizer(
        origin=files.origin,
        model=model,
        control=ControlTokens(control.values()),
        restarting=restarting if model.adds_prefix else frozenset(),
        special_tokens=special_tokens,
        adds_bos=adds_bos,
        chat_template=files.chat_template,
        spec=files.spec,
        config=files.config,
    )


def _open_model(files: TokenizerFiles, proto: Any, control: Iterable[ControlToken]) -> TextModel:
    if proto:
        return SentencePieceModel(proto, control, files.origin)
    return JsonModel(files.spec, control, files.origin)


def _check_forms_agree(model: TextModel, other: TextModel, origin: str) -> None:
    for text in SAMPLE:
        for continuation in (False, True):
            if model.encode(text, continuation=continuation) != other.encode(text, continuation=continuation):
                raise DataError(
                    f"{origin}: its sentencepiece model and its tokenizer.json disagree, first on {text!r}. "
                    "Keep the file that the model was trained with in the folder and take the other out."
                )
