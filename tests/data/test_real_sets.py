"""What becomes of every real set under `auto`: how many rows are read, how many refused and why, and how they load."""

import json
from collections import Counter

import pytest

from sft_jax.data.conversations import parse_row
from sft_jax.data.errors import RowError
from sft_jax.data.formats import detect_format
from sft_jax.data.sources import read_rows
from sft_jax.datatypes import Conversation, Document, Origin, RawRow
from sft_jax.row_formats import FORMATS

GSM8K = dict(prompt="question", completion="answer")
INSTANCES = dict(input="instances.0.input", output="instances.0.output")
LF, TINY = "llamafactory-demo", "torchtune-tiny"
# file -> {what its rows become under auto: how many}; for those that are refused, what the message says and the field
# map, if any, under which each row becomes a conversation.
REAL_SETS = {
    f"{LF}/alpaca_en_demo.json": ({"alpaca": 999}, None, {}),
    f"{LF}/identity.json": ({"alpaca": 91}, None, {}),
    f"{LF}/glaive_toolcall_en_demo.json": ({"sharegpt": 300}, None, {}),
    f"{LF}/reason_tool_use_demo_50.jsonl": ({"messages": 50}, None, {}),
    f"{LF}/v1_sft_demo.jsonl": ({"messages": 500}, None, {}),
    f"{LF}/c4_demo.jsonl": ({"text": 300}, None, {}),
    f"{LF}/dpo_en_demo.json": (
        {"preference_pair": 300}, "completion='chosen'", dict(prompt="conversations", completion="chosen")
    ),
    "fastchat/dummy_conversation.json": ({"sharegpt": 500}, None, {}),
    f"{TINY}/alpaca_tiny.json": ({"alpaca": 100}, None, {}),
    f"{TINY}/chat_tiny.json": ({"sharegpt": 1}, None, {}),
    f"{TINY}/hh_rlhf_tiny.json": ({"preference_pair": 1}, "fields=dict(messages='chosen')", dict(messages="chosen")),
    f"{TINY}/instruct_tiny.json": ({"wrong_format": 2}, "fields=dict(output='response')", dict(output="response")),
    f"{TINY}/stack_exchange_paired_tiny.json": (
        {"preference_pair": 25}, "completion='response_j'", dict(prompt="question", completion="response_j")
    ),
    "gsm8k/train.jsonl": ({"wrong_format": 7473}, "fields=dict(prompt='question', completion='answer')", GSM8K),
    "gsm8k/test.jsonl": ({"wrong_format": 1319}, "fields=dict(prompt='question', completion='answer')", GSM8K),
    "gsm8k/test_socratic.jsonl": ({"wrong_format": 1319}, "fields=dict(prompt=", GSM8K),
    "self-instruct/seed_tasks.jsonl": ({"wrong_format": 175}, "output='instances.0.output'", INSTANCES),
    "self-instruct/user_oriented_instructions.jsonl": ({"wrong_format": 252}, "'instances.0.output'", INSTANCES),
    "oasst/en_100_tree.jsonl": (
        {"conversation_tree": 100}, "a tree of replies", dict(prompt="prompt.text", completion="prompt.replies.0.text")
    ),
    "bfcl/BFCL_v4_irrelevance.json": ({"wrong_format": 240}, "it evaluates calls", {}),
    "bfcl/BFCL_v4_live_simple.json": ({"wrong_format": 258}, "it evaluates calls", {}),
    "bfcl/BFCL_v4_multi_turn_base.json": ({"wrong_format": 200}, "it evaluates calls", {}),
    "bfcl/BFCL_v4_multiple.json": ({"wrong_format": 200}, "it evaluates calls", {}),
    "bfcl/BFCL_v4_parallel.json": ({"wrong_format": 200}, "it evaluates calls", {}),
    "bfcl/BFCL_v4_parallel_multiple.json": ({"wrong_format": 200}, "it evaluates calls", {}),
    "bfcl/BFCL_v4_simple_python.json": ({"wrong_format": 400}, "it evaluates calls", {}),
}  # fmt: skip
FOLDERS_OF_ONE_KIND = {
    "bfcl/possible_answer": "has answers without their questions",
    "bfcl/multi_turn_func_doc": "is the schema of a tool",
}


def real_rows(path):
    """The rows of a file: of a JSON array, of JSON lines named .json, or as the product reads them."""
    if path.suffix == ".jsonl":
        yield from read_rows(str(path))
        return
    text = path.read_text()
    array = text.lstrip().startswith("[")
    values = json.loads(text) if array else [json.loads(line) for line in text.split("\n") if line.strip()]
    for i, value in enumerate(values):
        yield RawRow(value, Origin(str(path), i + 1))


def account(path, field_map):
    """What became of the rows, and the first message."""
    counts, message, format = Counter(), "", ""
    for sample in real_rows(path):
        try:
            format = format or detect_format(sample, field_map)
            parsed = parse_row(sample, format, {}, field_map)
            assert isinstance(parsed, Document if format == "text" else Conversation)
            counts[format] += 1
        except RowError as error:
            counts[error.reason] += 1
            message = message or str(error)
    return counts, message


def test_the_table_has_every_real_set(assets):
    folder = assets / "sft"
    files = {str(path.relative_to(folder)) for path in folder.rglob("*.json*")}
    assert {file for file in files if file.rpartition("/")[0] not in FOLDERS_OF_ONE_KIND} == REAL_SETS.keys()


@pytest.mark.parametrize("file", REAL_SETS)
def test_real_sets(assets, file):
    expected, says, field_map = REAL_SETS[file]
    counts, message = account(assets / "sft" / file, {})
    assert counts == expected
    assert (says or "") in message
    assert bool(says) == bool(message)
    if field_map:
        mapped, message = account(assets / "sft" / file, field_map)
        assert sum(mapped[format] for format in FORMATS) == sum(expected.values()), message


@pytest.mark.parametrize("folder", FOLDERS_OF_ONE_KIND)
def test_real_files_that_hold_no_rows(assets, folder):
    for path in (assets / "sft" / folder).glob("*.json"):
        counts, message = account(path, {})
        assert counts.keys() == {"wrong_format"}
        assert FOLDERS_OF_ONE_KIND[folder] in message


def test_what_real_tool_calls_become(assets):
    """Each call of glaive and of the reasoning set is there, with its arguments, reasoning and tools."""
    glaive = assets / "sft" / LF / "glaive_toolcall_en_demo.json"
    conversations = [parse_row(sample, "sharegpt") for sample in real_rows(glaive)]
    made = [call for c in conversations for message in c.messages for call in message.tool_calls]
    assert len(made) == 211
    assert sum(bool(c.tools) for c in conversations) == 191
    reasoning = [
        parse_row(sample, "messages") for sample in real_rows(glaive.with_name("reason_tool_use_demo_50.jsonl"))
    ]
    turns = [message for c in reasoning for message in c.messages if message.role == "assistant"]
    assert len(turns) == 112
    assert all(message.reasoning for message in turns)
    assert sum(len(message.tool_calls) for message in turns) == 41 + 2 * 9 + 3 * 3
    weighted = [parse_row(sample, "messages") for sample in real_rows(glaive.with_name("v1_sft_demo.jsonl"))]
    assert {message.loss_weight for c in weighted for message in c.messages} == {None, 1.0}
