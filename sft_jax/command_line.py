"""argv -> Config, and an error -> one message on stderr and the exit status that datatypes.py gives it."""

import argparse
import difflib
import functools
import json
import logging
import os
import re
import runpy
import select
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TextIO

import ml_collections
import yaml
from absl import flags
from ml_collections import config_flags

from sft_jax.config import default_config, from_config_dict
from sft_jax.config_schema import Config
from sft_jax.datatypes import ConfigError, SftError, StorageError


def run_command(command: Callable[[list[str]], int | None], argv: Sequence[str] | None = None) -> int:
    """Call `command` with the arguments left after `--debug`, and turn a SftError into its message and status."""
    args = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in args
    args = [arg for arg in args if arg != "--debug"]
    logging.getLogger("absl").setLevel(logging.INFO if debug else logging.WARNING)
    if not debug:
        warnings.simplefilter("ignore")
    try:
        return command(args) or 0
    except KeyboardInterrupt:
        if debug:
            raise
        print("interrupted: the same command goes on from what is finished", file=sys.stderr)
        return 128 + signal.SIGINT
    except BrokenPipeError:
        if debug or not _is_unread(sys.stdout):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is not flushed yet
        return 128 + signal.SIGPIPE
    except (SftError, OSError) as error:
        status = None if debug else say_error(error)
        if status is None:
            raise
        return status


def say_error(error: Exception) -> int | None:
    """Print the message of an error that a user can mend. Returns the exit status, or None for any other."""
    if isinstance(error, SftError):
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    if isinstance(error, OSError) and error.filename is not None:
        hint = "Is the disk there, with free space, and may you read and write there? --debug shows where it failed."
        print(f"error: {error.filename}: {error.strerror}. {hint}", file=sys.stderr)
        return StorageError.exit_code
    return None


def _is_unread(out: TextIO) -> bool:
    """Whether who read a pipe has had enough, as `head` has."""
    poll = select.poll()
    poll.register(out, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def config_parser(prog: str, description: str, example: str) -> argparse.ArgumentParser:
    """A parser whose unknown arguments are left for `read_config`; its help ends with the example."""
    return argparse.ArgumentParser(
        prog=prog,
        description=f"{description} Takes --config=FILE (.py, .yaml, .json, or a run's config.json) and "
        "--config.section.field=value.",
        epilog=f"example: {example}",
        allow_abbrev=False,
    )


def read_config(args: Sequence[str]) -> Config:
    """`["--config=configs/demo.py", "--config.batch.batch_size=8"]` -> Config.

    Raises:
      ConfigError: no such file, a file that does not run, an unknown field, a wrong type, or a failed check.
    """
    path, rest = _split_config_path(args)
    if not Path(path).is_file():
        raise ConfigError(
            f"--config={path}: no such file. Name a Python file with get_config(), a YAML or JSON file, or a run's "
            "config.json."
        )
    values, argv = flags.FlagValues(), ["sft_jax", *rest]
    loaded = _load_config_dict(path)
    for arg in rest:
        _check_override(loaded, arg)
    try:
        config_flags.DEFINE_config_dict("config", loaded, flag_values=values, sys_argv=argv)
        left = values(argv)[1:]
    except flags.Error as error:
        raise ConfigError(str(error)) from error
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        hint = "Is the field there? Lists and free sections are set in the file."
        raise ConfigError(f"{' '.join(rest)}: {type(error).__name__}: {error}. {hint}") from error
    if left:
        raise ConfigError(f"{left[0]}: is not an option. Options begin with --config.")
    return from_config_dict(values["config"].value)


def _check_override(config: ml_collections.ConfigDict, arg: str) -> None:
    """`--config.a.b[0].c=value` must name a field that is there."""
    name = arg.split("=")[0].removeprefix("--")
    keys = [key.split("[")[0] for key in name.split(".")[1:]]
    section = config
    for depth, key in enumerate(keys):
        if not isinstance(section, ml_collections.ConfigDict) or not section.is_locked:
            return  # an item of a list, or a free key
        if key not in section:
            close = difflib.get_close_matches(key, section.keys(), n=1) or [", ".join(section.keys())]
            raise ConfigError(f"--{name}: {'.'.join(['config', *keys[:depth]])} has no {key}. Did you mean {close[0]}?")
        section = section[key]


def _load_config_dict(path: str) -> ml_collections.ConfigDict:
    """What `get_config()` of a Python file returns; or the fields of a JSON or YAML file, which runs nothing, over the
    defaults."""
    config, parse = default_config(), _PARSERS.get(Path(path).suffix)
    expected = "a section for each part of the config, with the fields that differ from the defaults"
    try:
        if parse:
            config.update(parse(Path(path).read_text()))
        else:
            expected = "get_config(), which returns what sft_jax.config.default_config() gives, changed"
            config = runpy.run_path(path)["get_config"]()
    except (Exception, SystemExit) as error:  # it is the user's program: whatever it raises, it is the config's error
        raise ConfigError(
            f"--config={path}: {type(error).__name__}: {error}. It must have {expected}. --debug shows where it failed."
        ) from error
    if not isinstance(config, ml_collections.ConfigDict):
        raise ConfigError(f"--config={path}: get_config() returns {type(config).__name__}; expected a ConfigDict.")
    return config


class _Yaml(yaml.SafeLoader):
    """No key twice, of which the last would count; and 1e-5 is a number, as in JSON."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        _each_once([(key.value, None) for key, _ in node.value])
        return super().construct_mapping(node, deep)


_Yaml.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), [*"-+0123456789"])


def _each_once(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for key in found if [name for name, _ in pairs].count(key) > 1)
        raise ValueError(f"{twice!r} is there twice")
    return found


def _parse_yaml(text: str) -> Any:
    return yaml.load(text, _Yaml)  # a SafeLoader


_PARSERS: dict[str, Callable[[str], Any]] = {
    ".json": functools.partial(json.loads, object_pairs_hook=_each_once),
    ".yaml": _parse_yaml,
    ".yml": _parse_yaml,
}


def _split_config_path(args: Sequence[str]) -> tuple[str, list[str]]:
    """(path of --config, the other arguments); both `--config=path` and `--config path`."""
    args = list(args)
    for i, arg in enumerate(args):
        if arg.startswith("--config="):
            return arg.removeprefix("--config="), args[:i] + args[i + 1 :]
        if arg == "--config" and i + 1 < len(args):
            return args[i + 1], args[:i] + args[i + 2 :]
    raise ConfigError("--config: is missing. Name an experiment, for example --config=configs/demo.py.")
