"""A tokenizer folder -> its model file and what the small JSON files beside it say; and those written back.

Hugging Face folders say the same thing in up to five places. Order here, later ones winning: added_tokens.json,
special_tokens_map.json, tokenizer_config.json; for the template, chat_template.jinja wins over tokenizer_config.json.
"""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sft_jax.data.control_tokens import ControlToken, ControlTokens, control_token_from_json, control_tokens_to_json
from sft_jax.datatypes import ConfigError, DataError

SPECIAL_ROLES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
_MODEL_NAMES = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
_TIKTOKEN_LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n")


@dataclass(frozen=True)
class TokenizerFiles:
    """What a tokenizer folder holds. JSON files that are absent are empty."""

    origin: str
    sentencepiece: bytes | None = None  # the .model
    spec: dict[str, Any] = field(default_factory=dict)  # tokenizer.json
    config: dict[str, Any] = field(default_factory=dict)  # tokenizer_config.json
    special_tokens: dict[str, str] = field(default_factory=dict)  # role such as "bos_token" -> text
    added_tokens: tuple[ControlToken, ...] = ()
    chat_template: str = ""


def read_tokenizer_files(path: str | Path) -> TokenizerFiles:
    """Read a folder, or one file alone. A file's kind is found by its content, never by its name.

    Raises:
      ConfigError: there is no tokenizer at `path`.
      DataError: a file is damaged, or of a kind that we do not run.
    """
    path = Path(path).expanduser()
    if path.is_file():
        return _add_model_file(TokenizerFiles(str(path)), path)
    if not path.is_dir():
        raise ConfigError(f"config.data.tokenizer: {path} does not exist. Name a tokenizer's folder or file.")
    config = _read_json(path / "tokenizer_config.json")
    special = _read_json(path / "special_tokens_map.json") | config
    added = [ControlToken(text, token_id) for text, token_id in _read_json(path / "added_tokens.json").items()]
    for token_id, fields in config.get("added_tokens_decoder", {}).items():
        added.append(control_token_from_json(fields, int(token_id)))
    files = TokenizerFiles(
        origin=str(path),
        config=config,
        special_tokens={role: _token_text(special[role]) for role in SPECIAL_ROLES if special.get(role)},
        added_tokens=tuple(added),
        chat_template=_read_chat_template(path, config),
    )
    models = [path / "tokenizer.json", *(path / name for name in _MODEL_NAMES)]
    models = [file for file in models if file.is_file()] or sorted(path.glob("*.model*"))
    if not models:
        names = ", ".join(sorted(file.name for file in path.iterdir())) or "nothing"
        raise ConfigError(
            f"config.data.tokenizer: {path} has no tokenizer.json and no sentencepiece .model, only {names}. "
            "Name another folder, or convert what is there to tokenizer.json."
        )
    for file in models:
        if not (files.spec and _is_tiktoken(_read_bytes(file))):  # Llama-3's ranks beside the same in tokenizer.json
            files = _add_model_file(files, file)
    return files


def _add_model_file(files: TokenizerFiles, path: Path) -> TokenizerFiles:
    content = _read_bytes(path)
    if content.lstrip()[:1] == b"{":
        spec = _read_json(path)
        if "model" not in spec:
            raise DataError(f"{path}: has no 'model' entry, so it is no tokenizer.json. Name the right file.")
        return TokenizerFiles(**(vars(files) | {"spec": spec}))
    if _is_tiktoken(content):
        raise DataError(
            f"{path}: holds tiktoken ranks (as Llama-3's original release does), which are not read. "
            "Use the tokenizer.json of the same model's Hugging Face folder."
        )
    if files.sentencepiece is not None:
        raise DataError(f"{path}: a second sentencepiece model in one folder. Name the file that is meant.")
    return TokenizerFiles(**(vars(files) | {"sentencepiece": content}))


def _is_tiktoken(content: bytes) -> bool:
    return bool(_TIKTOKEN_LINE.match(content))


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        what = f"{path} cannot be read: {error.strerror}"
        raise DataError(f"config.data.tokenizer: {what}. Check the path and its permissions.") from error


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(_read_bytes(path).decode())
    except ValueError as error:
        raise DataError(f"{path}: is not JSON: {error}. Fetch the file again.") from error
    if not isinstance(value, dict):
        raise DataError(f"{path}: holds a {type(value).__name__}; expected a JSON object. Fetch the file again.")
    return value


def _token_text(value: Any) -> str:
    return value["content"] if isinstance(value, dict) else value


def read_template_file(path: Path) -> str:
    """
    Raises:
      ConfigError: it cannot be read, or is no text.
    """
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        what = f"{path} is not UTF-8: {error}. Convert it, or name another file"
        raise ConfigError(f"config.data.chat_template: {what}.") from error
    except OSError as error:
        what = f"{path} cannot be read: {error.strerror}. Check its permissions"
        raise ConfigError(f"config.data.chat_template: {what}.") from error


def _read_chat_template(path: Path, config: dict[str, Any]) -> str:
    if (path / "chat_template.jinja").is_file():
        return read_template_file(path / "chat_template.jinja")
    template = config.get("chat_template") or ""
    if isinstance(template, list):  # several by name, as Command-R has
        named = {entry["name"]: entry["template"] for entry in template}
        if "default" not in named:
            raise ConfigError(
                f"config.data.chat_template: {path}/tokenizer_config.json has chat templates {', '.join(named)} and "
                "none named 'default'. Save the one that is meant to a file, and name that here."
            )
        return named["default"]
    return template


def write_tokenizer_files(
    folder: Path,
    config: dict[str, Any],
    special_tokens: dict[str, str],
    control: ControlTokens,
    normalized: set[int],
    chat_template: str,
) -> None:
    """Write tokenizer_config.json, special_tokens_map.json and chat_template.jinja.

    Args:
      config: what tokenizer_config.json shall hold besides tokens and template.
      normalized: ids of control tokens that tokenizer.json matches after its normalizer.
      chat_template: Jinja text; empty: none is written.
    """
    entries = control_tokens_to_json(control.tokens, normalized)
    config = config | special_tokens
    config["added_tokens_decoder"] = {str(entry.pop("id")): entry for entry in entries}
    config.pop("chat_template", None)
    if chat_template:
        config["chat_template"] = chat_template
        (folder / "chat_template.jinja").write_text(chat_template, encoding="utf-8")
    write_json(folder / "tokenizer_config.json", config)
    write_json(folder / "special_tokens_map.json", special_tokens)


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
