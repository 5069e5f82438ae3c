"""`sft-jax plan` on fake CPU devices: the whole command, with no TPU compiler."""

import dataclasses
import json
import re

import jax
import pytest

from sft_jax.cli import plan as plan_command
from sft_jax.cli.main import dispatch
from sft_jax.command_line import read_config, run_command
from sft_jax.experiment import COMPILER_OPTIONS, jit_train_step, read_model_config
from sft_jax.model import gradient_sums
from sft_jax.model.gradient_sums import Torus
from sft_jax.model.param_dims import logical_dims
from sft_jax.model.presets import preset_config
from sft_jax.model.transformer import abstract_params
from sft_jax.placed_model import ModelOnMesh
from sft_jax.planning import topology
from sft_jax.planning.cases import Outcome
from sft_jax.sharding import Batch, abstract_batch, build_mesh, is_on_host
from sft_jax.training.state import init_state

CONFIG = """
from sft_jax.config import default_config

def get_config():
    config = default_config()
    config.run.dir = "run"
    config.model.preset = "testbed"
    config.model.path = "models/that/are/not/here"
    config.data.train = [dict(path="data/that/is/not/here.jsonl")]
    config.data.max_seq_len = 256
    config.batch.batch_size = 8
    return config
"""
KEYS = {"fits", "peak_bytes", "hbm_bytes", "bytes", "flops", "collective_bytes", "step_seconds", "mfu",
        "compile_seconds"}  # fmt: skip


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.py").write_text(CONFIG)
    return tmp_path


def run(capsys, *args):
    status = run_command(dispatch, ["plan", "--config=config.py", *args])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def plan(capsys, *args):
    status, out, err = run(capsys, "--json", *args)
    assert err == ""
    return status, json.loads(out)


@pytest.mark.parametrize(("moment_dtype", "offload"), [("float32", False), ("bfloat16", False), ("float32", True)])
def test_bytes_equal_those_of_live_arrays(folder, capsys, moment_dtype, offload):
    args = ["--config.mesh.fsdp=2", "--config.mesh.tensor=2", "--config.mesh.replica=2"]
    args += [f"--config.optimizer.moment_dtype={moment_dtype}", f"--config.optimizer.offload={offload}"]
    status, found = plan(capsys, "--topology=cpu:8", *args)
    assert status == 0
    assert found.keys() >= KEYS

    config = read_config(["--config=config.py", *args, "--config.model.path=", "--config.data.tokenizer=x"])
    placed = ModelOnMesh(config, read_model_config(config), build_mesh(config.mesh))
    params, frozen = placed.open_params()
    state = init_state(params, placed.optimizer, offload)
    shapes = abstract_batch(placed.mesh, 8, 256)
    batch = jax.tree.map(lambda leaf: jax.device_put(jax.numpy.ones(leaf.shape, leaf.dtype), leaf.sharding), shapes)
    assert isinstance(batch, Batch)
    live = lambda tree, host=False: sum(  # noqa: E731
        leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree) if is_on_host(leaf) == host
    )
    assert found["host_bytes"] == live(state, host=True)
    assert bool(found["host_bytes"]) == offload
    assert found["bytes"]["parameters"] == live(state.params)
    assert found["bytes"]["optimizer"] == live(state.opt_state)
    moments = 8 if moment_dtype == "float32" else 4
    state_bytes = found["bytes"]["optimizer"] + found["host_bytes"]
    assert state_bytes == found["bytes"]["parameters"] / 4 * moments + (4 if moments == 8 else 8)
    read = dataclasses.replace(batch, rows=())  # jit leaves out what no draw is keyed by
    assert found["bytes"]["arguments"] == live((state, frozen, read))
    new_state, metrics = jit_train_step(placed, 10, 1)(state, frozen, batch)
    results = live((new_state, metrics))
    num_results = len(jax.tree.leaves((new_state, metrics)))
    assert found["bytes"]["outputs"] == results + 8 * num_results  # and the table of the results' addresses


def test_the_compiler_is_told_what_a_run_tells_it(folder, capsys, monkeypatch, tmp_path):
    monkeypatch.setitem(COMPILER_OPTIONS, "cpu", {"xla_dump_to": str(tmp_path)})
    assert run(capsys, "--topology=cpu:1", "--config.batch.batch_size=1")[0] == 0
    assert any("train_step" in file.name for file in tmp_path.iterdir())


def test_a_compiler_that_does_not_know_what_it_is_told_goes_without(folder, capsys, caplog, monkeypatch):
    monkeypatch.setitem(COMPILER_OPTIONS, "cpu", {"no_such_option": 1})
    assert run(capsys, "--topology=cpu:1", "--config.batch.batch_size=1")[0] == 0
    assert "does not take {'no_such_option': 1}" in caplog.text


def test_a_layer_more_is_a_layers_flops_more(folder, capsys):
    flops = []
    for layers in (1, 2, 3):
        lines = (
            f'config.model.path = ""; config.data.tokenizer = "x"; config.model.overrides = {{"num_layers": {layers}}}'
        )
        (folder / "config.py").write_text(CONFIG.replace('config.model.path = "models/that/are/not/here"', lines))
        flops.append(plan(capsys, "--topology=cpu:1", "--config.batch.batch_size=1")[1]["flops"])
    assert flops[2] - flops[1] == pytest.approx(flops[1] - flops[0])
    assert flops[1] > 1.1 * flops[0]


def test_of_a_gradient_no_device_has_or_sends_the_whole_sum(folder, capsys, monkeypatch):
    """On a torus; that libtpu compiles to the same there takes minutes, and is in docs/scaling.md."""
    monkeypatch.setattr(gradient_sums, "find_torus", lambda mesh: Torus((2, 4), (True, True)))
    args = ["--config.mesh.fsdp=8", "--config.model.compute_dtype=float32"]
    found = plan(capsys, "--topology=cpu:8", *args)[1]
    sent = dict.fromkeys(("all-reduce", "reduce-scatter", "collective-permute"), 0)
    sent |= {entry["kind"]: entry["bytes"] for entry in found["collectives"]}
    shapes = abstract_params(preset_config("testbed", {}), "float32")
    split = sum(leaf.size for path, leaf in shapes.items() if "embed" in logical_dims(path))
    split += shapes["embed.embedding"].size  # tied, and has a gradient at either end
    assert sent["collective-permute"] == split * 4 * 7 / 8
    assert sent["all-reduce"] + sent["reduce-scatter"] < 0.05 * sent["collective-permute"]


def test_what_does_not_fit_is_a_plan_with_status_1(folder, capsys, monkeypatch):
    small = topology.CHIPS["cpu"].__class__(**{**vars(topology.CHIPS["cpu"]), "hbm_bytes": 2**20})
    monkeypatch.setitem(topology.CHIPS, "cpu", small)
    status, found = plan(capsys, "--topology=cpu:1")
    assert status == 1
    assert not found["fits"]
    assert found["peak_bytes"] > found["hbm_bytes"] == 2**20
    status, out, _ = run(capsys, "--topology=cpu:1")
    assert status == 1
    assert "too much" in out
    assert "config.model.attention: is reference" in out
    assert "config.batch.grad_accum_steps: 8 rows" in out
    assert "config.optimizer.moment_dtype: is float32; bfloat16 halves " in out


def test_hours_are_counted_from_the_data_report(folder, capsys):
    assert plan(capsys, "--topology=cpu:8")[1]["hours"] == 0
    (folder / "run").mkdir()
    report = {"rows_per_epoch": 81, "supervised_fraction": 0.5, "fill_fraction": 1.0}
    (folder / "run" / "data_report.json").write_text(json.dumps(report))
    found = plan(capsys, "--topology=cpu:8")[1]
    assert found["num_steps"] == 21  # 2 epochs of 81 rows, 8 a step
    assert found["chip_hours"] == pytest.approx(8 * 21 * found["step_seconds"] / 3600)
    assert found["supervised_tokens_per_second"] == pytest.approx(found["tokens_per_second"] / 2)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--topology=v9:4"], "--topology=v9:4.*Known: .*v5p:2x2x1"),
        (["--topology=cpu:8", "--config.mesh.tensor=3"], "config.mesh: .* needs"),
        (["--topology=cpu:64"], "has 8 CPU devices"),
        (["--topology=cpu:8", "--config.batch.batch_size=6"], "config.batch: .*6 rows"),
        (["--topology=cpu:8", "--config.model.attention=splash", "--config.data.max_seq_len=200"], "Set 256"),
    ],
)
def test_what_cannot_run_is_a_config_error(folder, capsys, args, message):

    status, _, err = run(capsys, *args)
    assert status == 2
    assert re.search(message, err)


def test_without_the_tpu_compiler_it_says_what_to_install(folder, capsys, monkeypatch):
    def missing(*_, **__):
        raise RuntimeError("Unable to initialize backend 'tpu': libtpu.so: cannot open shared object file")

    monkeypatch.setattr(topology.topologies, "get_topology_desc", missing)
    status, _, err = run(capsys, "--topology=v5p:4x4x4")
    assert status == 2
    assert "pip install 'sft_jax[tpu]'" in err


def test_topologies_are_compared_in_processes_of_their_own(folder, capsys):
    status, out, err = run(capsys, "--topologies=cpu:2,cpu:3", "--json")
    assert status == 0  # one of them fits
    two, three = json.loads(out)["cases"]
    assert two["plan"]["fits"]
    assert two["plan"]["mesh"]["fsdp"] == 2
    assert three["plan"] is None
    assert re.match("config.batch: .* 8 rows, which the 3 shards", three["problem"])
    said = r"compiling: cpu:2\n  [\d.]+ MiB of 8.00 GiB, 0.0*[1-9]\d* s\ncompiling: cpu:3\n  NO: config.batch: .*\n"
    assert re.fullmatch(said, err)


def test_a_search_prints_its_table_and_the_best(folder, capsys, monkeypatch):
    def compile_quickly(case):
        fits = "--config.mesh.tensor=2" in case.args
        seconds = 2.0 + ("--config.model.remat=full" in case.args) if fits else 0.0
        plan = dict(fits=fits, peak_bytes=2**30, hbm_bytes=2**31, step_seconds=seconds, bound="memory", mfu=0.5)
        plan |= dict(tokens_per_second=8000.0, num_chips=8, collective_bytes=2**20, chip_hours=0.0, num_steps=0)
        return Outcome(case, plan)

    monkeypatch.setattr(plan_command, "run_case", compile_quickly)
    status, out, _ = run(capsys, "--topology=cpu:8", "--search")
    assert status == 0
    assert "best: --config=config.py --topology=cpu:8 --num-slices=1 --config.mesh.fsdp=4 --config.mesh.tensor=2" in out
    best = out.split("best: ")[1]
    assert "--config.model.remat=attention" in best
    status, out, _ = run(capsys, "--topology=cpu:8", "--search", "--json")
    cases = json.loads(out)["cases"]
    assert cases[0]["case"] == "fsdp 4, tensor 2, 2 microbatches, attention"
    assert (
        len({case["case"] for case in cases}) == len(cases) == 9
    )  # tensor 1; tensor 2 with 1 and 2 rows, by 4 policies


@pytest.mark.parametrize("args", [["--topologies=cpu:2,v9:4"], ["--topologies=cpu:2,cpu:4", "--search"]])
def test_what_cannot_be_compared_is_a_config_error(folder, capsys, args):
    assert run(capsys, *args)[0] == 2
