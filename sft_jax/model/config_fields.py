"""A JSON object of settings -> its values, each taken once and checked; what nobody took is left to be refused."""

from collections.abc import Collection, Mapping
from typing import Any

from sft_jax.datatypes import ConfigError

REQUIRED: Any = object()
_LARGEST = 2**63 - 1


class Fields:
    """The keys of a JSON object that no one has taken yet. `where` names the object in errors."""

    def __init__(self, values: dict[str, Any], where: str):
        self.rest = dict(values)
        self.where = where

    def take(self, name: str, kind: type, default: Any = REQUIRED) -> Any:
        """Remove and return a value; where it is absent or null, the default.

        Raises:
          ConfigError: for another type, or where there is neither value nor default.
        """
        return self._check(name, kind, self.rest.pop(name, None), default)

    def take_optional(self, name: str, kind: type, default: Any, null: Any = None) -> Any:
        """As `take`, but null means `null` and not the default."""
        is_null = name in self.rest and self.rest[name] is None
        return null if is_null and not self.rest.pop(name) else self.take(name, kind, default)

    def take_list(self, name: str, kind: type, default: Any = REQUIRED) -> Any:
        """As `take`, of a list whose every element is of `kind`."""
        values = enumerate(self.take(name, list, default))
        return [self._check(f"{name}[{index}]", kind, value, REQUIRED) for index, value in values]

    def refuse_nulls(self, names: Collection[str]) -> None:
        """Raises ConfigError where one of these keys is there and null."""
        for name, value in self.rest.items():
            if value is None and name in names:
                raise ConfigError(
                    f"{self.where}: {name} is null, and transformers makes no model of that. Remove the key."
                )

    def refuse_rest(
        self, harmless: frozenset[str], only: dict[str, Any], what: str, remedies: Mapping[str, str] | None = None
    ) -> None:
        """Raises ConfigError unless every key that is left is null, harmless, or has its only supported value.

        Args:
          remedies: what to do about some of those with another value.
        """
        rest = {name: value for name, value in self.rest.items() if value is not None and name not in harmless}
        for name, value in rest.items():
            if name in only and not _is_only(value, only[name]):
                remedy = (remedies or {}).get(name, f"If it was trained so, name another model; if not, remove {name}.")
                raise ConfigError(f"{self.where}: {name} is {value!r}; only {only[name]!r} is supported. {remedy}")
        unknown = sorted(rest.keys() - only.keys())
        if unknown:
            raise ConfigError(
                f"{self.where}: {', '.join(f'{name} = {rest[name]!r}' for name in unknown)}: not a known part of "
                f"{what}, so it might change its numbers. Remove it if it does not."
            )

    def _check(self, name: str, kind: type, value: Any, default: Any) -> Any:
        if value is None:
            if default is REQUIRED:
                raise ConfigError(f"{self.where}: has no {name}. The model cannot be built without it.")
            return default
        if type(value) is int and abs(value) > _LARGEST:
            raise ConfigError(f"{self.where}: {name} has more digits than any model needs. Correct it.")
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is float and not abs(value) <= _LARGEST:
            raise ConfigError(f"{self.where}: {name} is {value!r}; expected a number of at most 2 ** 63. Correct it.")
        if type(value) is not kind:  # not isinstance: True is an int
            raise ConfigError(f"{self.where}: {name} is {value!r}; expected {kind.__name__}.")
        return value


def _is_only(value: Any, supported: Any) -> bool:
    """Of an object, each value that it has."""
    if isinstance(value, dict) and isinstance(supported, dict):
        return value.items() <= supported.items()
    return value == supported
