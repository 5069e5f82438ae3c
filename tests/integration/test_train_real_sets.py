"""Every real set through the door that users take: opened by a config, trained for two steps, every row accounted for.

What `auto` refuses is opened again with the field map that the refusal itself names, or is no set of demonstrations.
Needs the assets."""

import ast
import math
import re

import jax
import pytest

from sft_jax.config import from_config_dict
from sft_jax.datatypes import DataError
from sft_jax.experiment import jit_train_step, open_renderer, open_train_data, place_batches, place_model
from sft_jax.training.state import init_state

NUM_STEPS, MAX_ROWS, MAX_SEQ_LEN = 2, 100, 1024
LF, TINY = "llamafactory-demo", "torchtune-tiny"
# Set -> (rows in the file; of those taken, how many have no part that fits; why auto refuses them).
SETS = {
    f"{LF}/alpaca_en_demo.json": (999, 0, ""),
    f"{LF}/identity.json": (91, 0, ""),
    f"{LF}/glaive_toolcall_en_demo.json": (300, 0, ""),
    f"{LF}/reason_tool_use_demo_50.jsonl": (50, 34, ""),
    f"{LF}/v1_sft_demo.jsonl": (500, 0, ""),
    f"{LF}/c4_demo.jsonl": (300, 0, ""),
    f"{LF}/dpo_en_demo.json": (300, 8, "preference_pair"),
    "fastchat/dummy_conversation.json": (500, 0, ""),
    f"{TINY}/alpaca_tiny.json": (100, 0, ""),
    f"{TINY}/chat_tiny.json": (1, 0, ""),
    f"{TINY}/hh_rlhf_tiny.json": (1, 0, "preference_pair"),
    f"{TINY}/instruct_tiny.json": (2, 0, "wrong_format"),
    f"{TINY}/stack_exchange_paired_tiny.json": (25, 18, "preference_pair"),
    "gsm8k/train.jsonl": (7473, 0, "wrong_format"),
    "gsm8k/test.jsonl": (1319, 0, "wrong_format"),
    "gsm8k/test_socratic.jsonl": (1319, 0, "wrong_format"),
    "self-instruct/seed_tasks.jsonl": (175, 1, "wrong_format"),
    "self-instruct/user_oriented_instructions.jsonl": (252, 0, "wrong_format"),
    "oasst/en_100_tree.jsonl": (100, 3, "conversation_tree"),
}
REFUSED = {
    "bfcl/*.json": "has no answer: it evaluates calls",
    "bfcl/possible_answer": "has answers without their questions",
    "bfcl/multi_turn_func_doc": "is the schema of a tool",
    f"{LF}/wiki_demo.txt": "has an unknown ending",
}


@pytest.fixture(scope="module")
def world(assets, tmp_path_factory):
    """(open, train): a set and its field map -> its data; data -> the metrics of each step. All share one step."""
    store, parts = str(tmp_path_factory.mktemp("store")), {}

    def read_config(name, fields):
        small = dict(num_layers=1, embed_dim=32, mlp_dim=64, num_heads=2, num_kv_heads=1, head_dim=16)
        data = dict(
            train=[dict(path=str(assets / "sft" / name), fields=fields, max_rows=MAX_ROWS)],
            tokenizer=str(assets / "tokenizers" / "minimind"),
            chat_template="qwen3",
            max_seq_len=MAX_SEQ_LEN,
            too_long="split_turns",
            store_dir=store,
            prepare_processes=1,
            read_threads=0,
        )
        model = dict(preset="testbed", overrides=small, compute_dtype="float32", remat="none")
        schedule = dict(num_steps=NUM_STEPS, warmup_steps=0)
        return from_config_dict(dict(data=data, model=model, schedule=schedule, batch=dict(batch_size=8)))

    def open_set(name, fields):
        config = read_config(name, fields)
        parts["renderer"] = parts.get("renderer") or open_renderer(config)
        return config, open_train_data(config, parts["renderer"])

    def train(config, data):
        placed = place_model(config, parts["renderer"])
        parts["step"] = parts.get("step") or jit_train_step(placed, data.num_steps, len(data.source_names))
        state = init_state(placed.open_params()[0], placed.optimizer)
        metrics = []
        for batch in place_batches(data, placed.mesh, config.batch.batch_size)():
            state, of_step = parts["step"](state, {}, batch)
            metrics.append(jax.device_get(of_step))
        assert int(state.num_updates) == NUM_STEPS
        return metrics

    return open_set, train


def field_map_of(message):
    """The first `fields=dict(...)` that a refusal names."""
    call = ast.parse(re.search(r"fields=(dict\(.*?\))", message)[1], mode="eval").body
    return {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}


@pytest.mark.parametrize("name", SETS)
def test_a_real_set_trains_and_balances(world, name):
    open_set, train = world
    num_rows, num_too_long, refused_for = SETS[name]
    num_taken, fields = min(num_rows, MAX_ROWS), {}
    if refused_for:
        with pytest.raises(DataError) as refusal:
            open_set(name, fields)
        assert f"{num_taken:,} of {num_taken:,} rows of " in str(refusal.value)
        assert f" {num_taken:,} {refused_for}: " in str(refusal.value)
        fields = field_map_of(str(refusal.value))
    config, data = open_set(name, fields)
    report = data.report
    outcomes = {outcome: report[f"rows_{outcome}"] for outcome in ("trained", "bad", "dropped", "not_taken")}
    assert outcomes == {
        "trained": num_taken - num_too_long,
        "bad": 0,
        "dropped": num_too_long,
        "not_taken": num_rows - num_taken,
    }
    assert report["rows_read"] == num_rows == sum(outcomes.values())
    (source,) = report["sources"].values()
    assert source["dropped"].keys() <= {"too_long"}
    losses = [float(of_step["loss"]) for of_step in train(config, data)]
    assert len(losses) == NUM_STEPS
    for loss in losses:  # random weights know nothing yet
        assert abs(loss - math.log(6400)) < 0.5


@pytest.mark.parametrize("name", REFUSED)
def test_what_holds_no_demonstrations_is_refused_and_said(world, name):
    open_set, _ = world
    with pytest.raises(DataError, match=REFUSED[name]):
        open_set(name, {})


def test_the_tables_have_every_real_file(assets):
    folder = assets / "sft"
    matched = {path for name in REFUSED for path in folder.glob(name if "." in name else f"{name}/*")}
    expected = {path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("LICENSE")}
    assert matched | {folder / name for name in SETS} == expected
