"""The door of the config: what it refuses, how it says so, and that every option is read somewhere."""

import ast
import dataclasses
import importlib.util
from pathlib import Path

import pytest

import sft_jax
from sft_jax.command_line import read_config
from sft_jax.config import MESH_AXES, default_config, from_config_dict, validate
from sft_jax.config_schema import Config, SourceConfig, source_name
from sft_jax.datatypes import ConfigError

ROOT = Path(sft_jax.__file__).parent
CONFIGS = sorted((ROOT.parent / "configs").glob("*.py"))


def good_config():
    config = default_config()
    config.model.preset = "testbed"
    config.data.tokenizer = "tokenizer"
    config.data.train = [dict(path="a.jsonl"), dict(path="b.jsonl")]
    return config


def test_defaults_convert():
    config = from_config_dict(good_config())
    assert config.data.train[1].path == "b.jsonl"
    assert config.schedule.num_steps is None
    assert from_config_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("batch.batch_size", 0, "config.batch.batch_size: is 0; expected at least 1"),
        ("batch.grad_accum_steps", 3, "config.batch.grad_accum_steps: 3 does not divide batch_size 64"),
        ("optimizer.name", "adam", "config.optimizer.name: is 'adam'; expected one of adamw"),
        ("optimizer.moment_dtype", "float16", "config.optimizer.moment_dtype: is 'float16'; expected one of float32"),
        (
            "optimizer",
            dict(name="adafactor", moment_dtype="bfloat16"),
            "config.optimizer.moment_dtype: is 'bfloat16', and adafactor's moments are small and float32",
        ),
        (
            "optimizer",
            dict(name="adafactor", offload=True),
            "config.optimizer.offload: is True, and ada",
        ),
        (
            "optimizer",
            dict(moment_dtype="bfloat16", offload=True),
            "config.optimizer.offload: is True, and ada",
        ),
        ("optimizer.learning_rate", float("nan"), "config.optimizer.learning_rate: is nan"),
        ("schedule.decay_fraction", 0.1, "config.schedule.decay_fraction: is set, but cosine has no such parameter"),
        ("mesh.replica", -1, "config.mesh: has more than one axis at -1"),
        ("checkpoint.best_by", "nope", "config.checkpoint.best_by: is 'nope'"),
        ("log.profile_steps", (3,), "config.log.profile_steps: is (3,)"),
        ("loss.label_smoothing", 1.0, "config.loss.label_smoothing: is 1.0; expected below 1"),
        ("loss.router_tokens", "some", "config.loss.router_tokens: is 'some'; expected one of all, supervised"),
        ("loss.router_z_loss_weight", -1.0, "config.loss.router_z_loss_weight: is -1.0; expected at least 0"),
        ("data.train", [dict(path="a.jsonl", format="csv")], "config.data.train[0].format: is 'csv'"),
        (
            "data.train",
            [dict(path="x/a.jsonl"), dict(path="y/a.jsonl")],
            "config.data.train[1].name: 'a' is used twice",
        ),
        ("data.train", [dict(pth="a.jsonl")], "config.data.train[0].pth: no such field. Did you mean"),
        ("data.row_order", "sorted", "config.data.row_order: is 'sorted'; expected one of shuffled, longest_first"),
        ("data.max_segments_per_row", -1, "config.data.max_segments_per_row: is -1; expected at least 0"),
        (
            "data.too_long",
            "cut",
            "config.data.too_long: is 'cut'; expected one of error, drop, drop_early_turns, split",
        ),
        ("data.train", [], "config.data.train: is empty"),
        (
            "data.train",
            [dict(path="a.jsonl", fields=dict(promt="q"))],
            "config.data.train[0].fields.promt: no field of the format auto. Did you mean prompt?",
        ),
        (
            "data.train",
            [dict(path="a.jsonl", format="text", fields=dict(prompt="q"))],
            "config.data.train[0].fields.prompt: no field of the format text. Known: text.",
        ),
        (
            "data.train",
            [dict(path="a.jsonl", fields=dict(text=""))],
            "config.data.train[0].fields.text: is empty. Name",
        ),
        (
            "data.train",
            [dict(path="a.jsonl", fields=dict(text=3))],
            "config.data.train[0].fields.text: is 3 (int); exp",
        ),
        ("data.policies", dict(two_user="keep"), "config.data.policies.two_user: no such reason. Did you mean two_us"),
        ("data.policies", dict(two_users="kept"), "config.data.policies.two_users: is 'kept'; expected one of error"),
        ("data.policies", dict(bad_part="keep"), "config.data.policies.bad_part: is 'keep', and such a row cannot"),
        ("data.policies", dict(too_long="drop"), "config.data.policies.too_long: is decided by config.data.too_long"),
        ("data.prepare_processes", -1, "config.data.prepare_processes: is -1; expected at least 0"),
        ("data.eval_overlap", "ignore", "config.data.eval_overlap: is 'ignore'; expected one of error, drop, keep"),
        ("data.train", [dict(path="a.jsonl", epochs=0.0)], "config.data.train[0].epochs: is 0.0; expected a positive"),
        ("data.train", [dict(path="a.jsonl", weight=float("nan"))], "config.data.train[0].weight: is nan; expected a"),
        ("data.train", [dict(path="a.jsonl", loss_weight=-1.0)], "config.data.train[0].loss_weight: is -1.0; expected"),
        (
            "data.train",
            [dict(path="a.jsonl", max_rows=-1)],
            "config.data.train[0].max_rows: is -1; expected at least 0",
        ),
        (
            "data.train",
            [dict(path="a.jsonl", weight=1.0, epochs=2.0)],
            "config.data.train[0].epochs: is set, and so is weight",
        ),
        (
            "data.train",
            [dict(path="a.jsonl", weight=1.0), dict(path="b.jsonl")],
            "config.data.train: has sources with a weight and sources without",
        ),
        ("data.train", [dict(path="a.jsonl", split="test")], "config.data.train[0].split: is 'test'; expected all, tr"),
        (
            "data.train",
            [dict(path="a.jsonl", split="train")],
            "config.data.train[0].held_out_fraction: is 0.0; split 'train' needs one between 0 and 1",
        ),
        (
            "data.train",
            [dict(path="a.jsonl", held_out_fraction=0.1)],
            "config.data.train[0].held_out_fraction: is 0.1, and split is 'all'",
        ),
        ("data.eval", [dict(path="c.jsonl", epochs=2.0)], "config.data.eval[0].epochs: is set; a held-out set is seen"),
        ("data.eval", [dict(path="./b.jsonl")], "config.data.eval[0].path: ./b.jsonl is config.data.train[1].path too"),
        (
            "data.eval",
            [dict(path="a.jsonl", split="held_out", held_out_fraction=0.1)],
            "config.data.eval[0].path: a.jsonl is config.data.train[0].path too",
        ),
        ("model.frozen_dtype", "float16", "config.model.frozen_dtype: is 'float16'; expected one of"),
        ("model.frozen_dtype", "bfloat16", "config.model.frozen_dtype: is set, and nothing is frozen"),
        ("lora.rank", -1, "config.lora.rank: is -1; expected at least 0"),
        ("lora.dropout", 0.1, "config.lora.dropout: is set, and lora.rank is 0"),
        ("lora", dict(rank=4, dropout=1.0), "config.lora.dropout: is 1.0; expected below 1"),
        ("lora", dict(rank=4, alpha=0.0), "config.lora.alpha: is 0.0; expected more than 0"),
        ("lora", dict(rank=4, targets=()), "config.lora.targets: is empty"),
        ("lora", dict(rank=4, targets=("q_proj(",)), "config.lora.targets: 'q_proj(' is no regular expression"),
        ("lora", dict(rank=4, quantize="fp4"), "config.lora.quantize: is 'fp4'; expected one of none, int8, int4, nf4"),
        ("lora", dict(rank=4, quantize="nf4"), "config.lora.quantize: is 'nf4', and model.path is empty"),
        ("data.role_map", dict(gpt="model"), "config.data.role_map.gpt: is 'model'; expected one of system"),
    ],
)
def test_refuses(path, value, message):
    config = good_config()
    section, *names = path.split(".")
    config[section].update({names[0]: value} if names else value)
    with pytest.raises(ConfigError) as error:
        from_config_dict(config)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("a/chats.jsonl", "chats"),
        ("a/chats.v2.json.gz", "chats.v2"),
        ("gs://bucket/chats/", "chats"),
        ("chats/*.parquet", "*"),
    ],
)
def test_a_source_is_named_after_its_path(path, name):
    assert source_name(SourceConfig(path=path)) == name
    assert source_name(SourceConfig(path=path, name="own")) == "own"


def test_policies_and_fields_of_sources():
    config = good_config()
    config.data.policies = dict(two_users="keep", empty_assistant="drop", ends_without_assistant="keep")
    config.data.train = [dict(path="a.jsonl", fields=dict(prompt="question", completion="answer"))]
    data = from_config_dict(config).data
    assert data.kept_reasons == {"two_users", "ends_without_assistant"}
    assert data.train[0].fields == {"prompt": "question", "completion": "answer"}


@pytest.mark.parametrize(
    ("fraction", "overlap", "good"), [(0.1, "error", True), (0.2, "error", False), (0.2, "keep", True)]
)
def test_a_file_may_be_both_sides_of_one_split(fraction, overlap, good):
    config = good_config()
    config.data.train = [dict(path="a.jsonl", split="train", held_out_fraction=0.1)]
    config.data.eval = [dict(path="a.jsonl", split="held_out", held_out_fraction=fraction)]
    config.data.eval_overlap = overlap
    if good:
        assert from_config_dict(config).data.eval[0].split == "held_out"
    else:
        with pytest.raises(ConfigError, match="both with the same held_out_fraction"):
            from_config_dict(config)


def test_wrong_types_and_unknown_fields_are_all_reported_together():
    values = from_config_dict(good_config()).to_dict()
    values["batch"]["batch_size"] = "many"
    values["batch"]["btach_size"] = 3
    values["optimzer"] = {}
    values["data"]["train"][0]["path"] = 5
    with pytest.raises(ConfigError) as error:
        from_config_dict(values)
    for part in ("config.batch.batch_size: is 'many' (str); expected int", "Did you mean config.batch.batch_size?",
                 "config.optimzer: no such field", "config.data.train[0].path: is 5 (int); expected str"):  # fmt: skip
        assert part in str(error.value)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_config_file_is_valid(path, monkeypatch, tmp_path):
    monkeypatch.setenv("SFT_JAX_ASSETS", str(tmp_path))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert validate(from_config_dict(module.get_config())) == []
    assert f"--config=configs/{path.name}" in module.__doc__, "a config's docstring carries its command"


def test_overrides_on_the_command_line(tmp_path):
    path = tmp_path / "c.py"
    path.write_text(
        "from sft_jax.config import default_config\n"
        "def get_config():\n"
        "    c = default_config(); c.model.path = 'm'; c.data.train = [dict(path='a.jsonl')]; return c\n"
    )
    args = [f"--config={path}", "--config.schedule.num_steps=7", "--config.data.train[0].path=b.jsonl"]
    config = read_config([*args, "--config.optimizer.b1=0.5", "--config.log.tensorboard=false"])
    assert (config.schedule.num_steps, config.optimizer.b1, config.log.tensorboard) == (7, 0.5, False)
    assert config.data.train[0].path == "b.jsonl"
    for args in (["--config.modle.path=x"], ["--config.batch.batch_size=lots"], ["stray"], ["--confg=3"]):
        with pytest.raises(ConfigError):
            read_config([f"--config={path}", *args])
    with pytest.raises(ConfigError, match="no such file"):
        read_config([f"--config={tmp_path}/none.py"])


def test_every_option_is_read_below_the_door():
    """A field that no code reads would be parsed and ignored."""
    read = set()
    for path in ROOT.rglob("*.py"):
        if path.name not in ("config.py", "config_schema.py"):
            read |= {node.attr for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)}
    schema = ast.parse((ROOT / "config_schema.py").read_text())
    inside = {node.attr for node in ast.walk(schema) if isinstance(node, ast.Attribute)}
    for section in dataclasses.fields(Config):
        for field in dataclasses.fields(section.default_factory):
            assert field.name in read | inside | set(MESH_AXES), f"{section.name}.{field.name} is never read"


FILES = {
    "new.yaml": "run: {dir: there}\nmodel: {preset: testbed}\noptimizer:\n  learning_rate: 1e-3\n"
    "data:\n  tokenizer: t\n  train:\n  - {path: a.jsonl, name: a}\n",
    "new.json": '{"run": {"dir": "there"}, "model": {"preset": "testbed"}, "optimizer": {"learning_rate": 1e-3}, '
    '"data": {"tokenizer": "t", "train": [{"path": "a.jsonl", "name": "a"}]}}',
}


@pytest.mark.parametrize("name", FILES)
def test_a_config_that_is_no_program(tmp_path, name):
    (tmp_path / name).write_text(FILES[name])
    config = read_config([f"--config={tmp_path / name}", "--config.run.seed=3"])
    assert (config.run.dir, config.run.seed, config.optimizer.learning_rate) == ("there", 3, 1e-3)
    assert config.data.train[0].name == "a"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.yaml", "run: {dir: a}\nrun: {dir: b}\n", "'run' is there twice"),
        ("a.json", '{"run": {"dir": "a", "dir": "b"}}', "'dir' is there twice"),
        ("a.yaml", "run: !!python/object/apply:os.system ['true']\n", "ConstructorError"),
        ("a.yaml", "runs: {dir: a}\n", "runs"),
        ("a.yml", "run: [", "ParserError"),
        ("a.yaml", "run\n", "It must have a section for each part"),
    ],
)
def test_a_config_file_that_is_wrong(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_config([f"--config={tmp_path / name}"])
