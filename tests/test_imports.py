"""The house has floors: a room imports only from lower ones, and rooms on one floor do not know each other."""

import ast
from pathlib import Path

import pytest

import sft_jax

ROOT = Path(sft_jax.__file__).parent
FLOORS = [
    {"datatypes", "typing", "row_formats", "row_reasons"},
    {"config_schema"},
    {"config"},
    {"data", "sharding", "command_line", "processes"},
    {"model"},
    {"checkpoint"},
    {"training", "inference"},
    {"testbed"},
    {"placed_model"},
    {"experiment", "provenance"},
    {"planning"},
    {"main"},
    {"cli"},
]
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
FILES = sorted(path for path in ROOT.rglob("*.py") if path.name != "__init__.py")


def imported_modules(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module


def room_of(path):
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def check_import(room, module):
    """None, or what is wrong with `room` importing `module`."""
    parts = module.split(".")
    if room == "data" and parts[0] == "jax":
        return "data/ is numpy and Python only"
    if parts[0] != "sft_jax" or len(parts) == 1:
        return None
    if room == "training" and parts[1] == "data":
        return "training/ receives an iterator"
    if parts[1] != room and FLOOR[parts[1]] >= FLOOR[room]:
        return f"{parts[1]} is not below {room}"
    return None


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_down(path):
    wrong = {module: check_import(room_of(path), module) for module in imported_modules(path)}
    assert not {module: why for module, why in wrong.items() if why}


def test_every_room_has_a_floor():
    assert {room_of(path) for path in FILES} <= set(FLOOR)


@pytest.mark.parametrize(
    ("room", "module"),
    [
        ("data", "jax.numpy"),
        ("data", "sft_jax.model.layers"),
        ("training", "sft_jax.data.store"),
        ("model", "sft_jax.main"),
    ],
)
def test_the_check_can_fail(room, module):
    assert check_import(room, module)
