"""What the checks of a row share: how a row is refused, and how its values are called where they must not be shown.

Messages of errors stand in logs, so that they name fields, roles and kinds, and never show a row's content.
"""

import json
from collections import Counter
from collections.abc import Iterable
from typing import Any, NoReturn

import msgspec

from sft_jax.data.errors import RowError
from sft_jax.datatypes import Origin
from sft_jax.row_reasons import REASONS

_MAX_NAMES = 12
_MAX_NAME_LENGTH = 40


class RowCheck:
    """The row that is being checked: its origin, the reasons that the policy `keep` lets pass, and the turns that it
    did let pass."""

    __slots__ = ("keep", "kept", "origin")

    def __init__(self, origin: Origin, keep: frozenset[str] = frozenset()):
        self.origin, self.keep = origin, keep
        self.kept: Counter[str] | None = None  # made where it is needed, which is seldom

    def allow(self, reason: str, problem: str, count: int = 1) -> None:
        """Count `count` turns that are kept although they are at fault; or refuse the row."""
        if reason not in self.keep:
            refuse(reason, self.origin, problem)
        self.kept = self.kept or Counter()
        self.kept[reason] += count


def refuse(reason: str, origin: Origin, problem: str, mend: str = "") -> NoReturn:
    """Raise a RowError whose message ends with how the reason is mended.

    Args:
      problem: begins with what is wrong, the origin being put before it; has no full stop, as `mend`.
      mend: in place of the reason's own.
    """
    mend = mend or REASONS[reason].mend
    if REASONS[reason].keep:
        mend = f"{mend}; or set config.data.policies.{reason} to drop or keep"
    raise RowError(reason, origin, f"{problem}. {mend}.")


def check_text(value: Any, where: str, origin: Origin, reason: str = "content_not_text") -> str:
    if not isinstance(value, str):
        refuse(reason, origin, f"{where} is {kind(value)}; expected a string")
    return value


def is_absent(value: Any) -> bool:
    """Null, or an empty string, list or object, as exporters write for absent fields; 0 and false are values."""
    return value is None or (isinstance(value, str | list | dict) and not value)


def kind(value: Any) -> str:
    """JSON's name of a value's type."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number" if isinstance(value, int | float) else f"a {type(value).__name__}")


def list_names(names: Iterable[str]) -> str:
    """Names of fields or roles, in alphabetical order and of bounded length."""
    shown = sorted(names)
    more = f" and {len(shown) - _MAX_NAMES:,} more" if len(shown) > _MAX_NAMES else ""
    return (", ".join(map(show_name, shown[:_MAX_NAMES])) or "nothing") + more


def show_name(name: str) -> str:
    if len(name) > _MAX_NAME_LENGTH:
        return f"{name[:_MAX_NAME_LENGTH]!r}..."
    return name if name.isprintable() and name else repr(name)


def parse_json(text: str) -> Any:
    """JSON inside a string of a row, read as strictly as the row itself.

    Raises:
      ValueError: says what is wrong, without a full stop.
    """
    try:
        value = msgspec.json.decode(text)
        json.loads(text, object_pairs_hook=_refuse_duplicates, parse_int=str, parse_float=str)  # only keys matter here
    except RecursionError as error:
        raise ValueError("JSON is nested too deeply") from error
    except UnicodeEncodeError as error:
        raise ValueError("half of a surrogate pair") from error
    except msgspec.MsgspecError as error:
        raise ValueError(str(error)) from error
    return value


def write_json(value: Any) -> str:
    """The JSON text of a value.

    Raises:
      ValueError: it has none that every reader understands.
    """
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
        text.encode()
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    except UnicodeEncodeError as error:
        raise ValueError("half of a surrogate pair") from error
    except TypeError as error:
        raise ValueError("a value that JSON does not have") from error
    except ValueError as error:
        raise ValueError("a number that is NaN, infinite or too long") from error
    return text


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> None:
    if len({key for key, _ in pairs}) < len(pairs):
        raise ValueError("a key twice in one object")
