"""Published demonstrations -> rows of messages: nothing in them is changed, no prompt is on both sides of the split."""

import json
from pathlib import Path

import pytest

from sft_jax.data.conversations import parse_row
from sft_jax.data.sources import read_rows
from sft_jax.datatypes import RawRow
from sft_jax.testbed.real_data import HELD_OUT_FRACTION, convert, is_held_out, read_oasst, read_self_instruct


def node(role, text, replies=(), rank=None):
    return {"role": role, "text": text, "replies": list(replies), "rank": rank}


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_oasst_follows_the_best_ranked_reply_of_each_first_answer(tmp_path):
    again = [
        node("prompter", "Worse", [node("assistant", "W")], rank=1),
        node("prompter", "Better", [node("assistant", "B")], rank=0),
    ]
    answers = [
        node("assistant", "Unranked"),
        node("assistant", "Second", [node("prompter", "Thanks")], rank=1),
        node("assistant", "First", again, rank=0),
    ]
    path = write_rows(tmp_path / "trees.jsonl", [{"message_tree_id": "t", "prompt": node("prompter", "Hi", answers)}])
    rows = {row_id: [(m.role, m.content) for m in messages] for row_id, messages in read_oasst(path)}
    hi = ("user", "Hi")
    assert rows == {
        "t/0": [hi, ("assistant", "First"), ("user", "Better"), ("assistant", "B")],
        "t/1": [hi, ("assistant", "Second")],
        "t/2": [hi, ("assistant", "Unranked")],
    }


def test_self_instruct_puts_the_input_below_the_instruction(tmp_path):
    instances = [{"input": "", "output": "A"}, {"input": "x", "output": "B"}]
    path = write_rows(tmp_path / "tasks.jsonl", [{"id": "s", "instruction": "Do it.", "instances": instances}])
    rows = {row_id: [message.content for message in messages] for row_id, messages in read_self_instruct(path)}
    assert rows == {"s/0": ["Do it.", "A"], "s/1": ["Do it.\n\nx", "B"]}


def test_split_goes_by_the_tree_or_task():
    assert is_held_out("seed_task_1/0") == is_held_out("seed_task_1/7")
    assert [i for i in range(20) if is_held_out(f"seed_task_{i}/0")] == [1, 11]
    share = sum(is_held_out(f"{i}/0") for i in range(10_000)) / 10_000
    assert share == pytest.approx(HELD_OUT_FRACTION, abs=0.02)


def test_the_real_files(assets, tmp_path):
    counts = convert(Path(assets), tmp_path)
    assert counts == {
        "oasst_train.jsonl": 285,
        "oasst_held_out.jsonl": 48,
        "self_instruct_train.jsonl": 353,
        "self_instruct_held_out.jsonl": 74,
    }
    prompts = {}
    for name, count in counts.items():
        rows = list(read_rows(str(tmp_path / name)))
        assert len(rows) == count
        assert all(isinstance(row, RawRow) for row in rows)
        conversations = [parse_row(row, "messages") for row in rows]
        prompts[name] = {conversation.messages[0].content for conversation in conversations}
    assert not prompts["oasst_train.jsonl"] & prompts["oasst_held_out.jsonl"]
