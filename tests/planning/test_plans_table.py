"""docs/plans.json, which `make plans` writes, and what follows from it: no figure without the config that it is of."""

import importlib.util
import json
import runpy
from pathlib import Path

import pytest

from sft_jax.planning.cases import Case, run_case

ROOT = Path(__file__).parents[2]
SPEC = importlib.util.spec_from_file_location("plans", ROOT / "benchmarks" / "plans.py")
plans = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(plans)
TABLE = json.loads(plans.TABLE.read_text())

# Two layers of it, and rows that a CPU compiles in seconds.
SMALL = """
import runpy

def get_config():
    config = runpy.run_path({path!r})["get_config"]()
    config.run.distributed = False
    config.model.path, config.data.tokenizer = "", "x"
    config.model.overrides = {{"num_layers": 2}}
    return config
"""


@pytest.mark.parametrize("name", sorted(TABLE))
def test_a_row_is_of_the_config_as_it_is(name):
    assert TABLE[name]["digest"] == plans.digest(name), "make plans"
    assert TABLE[name]["command"] == " ".join(("sft-jax plan", *plans.case_args(name)))


def test_the_digest_sees_what_a_plan_depends_on(monkeypatch):
    before = plans.digest("8b")
    others = (("v5p:2x2x1", ()), ("v6e:4x4", ("--config.model.remat=dots",)), ("v6e:4x4", ("--num-slices=2",)))
    for topology, rest in others:
        monkeypatch.setitem(plans.CASES, "8b", ("8b", topology, ("--config.batch.batch_size=16", *rest)))
        assert plans.digest("8b") != before
    elsewhere = ("--config.model.path=elsewhere", "--config.run.dir=there", "--config.log.every_steps=3")
    monkeypatch.setitem(plans.CASES, "8b", ("8b", "v6e:4x4", ("--config.batch.batch_size=16", *elsewhere)))
    assert plans.digest("8b") == before


@pytest.mark.parametrize("name", [name for name, (config, _, _) in plans.CASES.items() if name == config])
def test_the_heads_of_configs_say_what_was_found(name):
    docstring = runpy.run_path(str(ROOT / "configs" / f"{name}.py"))["__doc__"]
    assert f"\n{plans.head_lines(name, TABLE)}\n" in docstring


def test_a_row_that_was_read_otherwise_keeps_its_memory_and_loses_its_time():
    assert plans.is_current("8b", TABLE | {"8b": TABLE["8b"] | {"versions": plans.versions()}})
    told_otherwise = {"versions": plans.versions(), "told": {"an_option": 1}}
    assert not plans.is_current("8b", TABLE | {"8b": TABLE["8b"] | told_otherwise})
    table = {"8b": TABLE["8b"] | {"versions": plans.versions(), "reading": plans.READING - 1}}
    assert not plans.is_current("8b", table)
    assert "12.04 of 31.24 GiB" in plans.page_table(table)
    assert "to be read again" in plans.page_table(table)
    assert "Time:" in plans.head_lines("8b", TABLE)
    assert "Time:" not in plans.head_lines("8b", table)


def test_the_page_has_the_table():
    assert plans.page_table(TABLE) in plans.PAGE.read_text()


def compile_small(tmp_path, *args):
    config = tmp_path / "small.py"
    config.write_text(SMALL.format(path=str(ROOT / "configs" / "1b_single_host.py")))
    small = ("--config.batch.batch_size=16", "--config.batch.grad_accum_steps=2", "--config.data.max_seq_len=256")
    return run_case(Case("small", (f"--config={config}", *small, *args)))


def test_two_layers_compile_on_fake_devices(tmp_path):
    outcome = compile_small(tmp_path, "--topology=cpu:8", "--config.model.attention=reference")
    assert outcome.fits, outcome.problem
    assert outcome.plan["mesh"]["fsdp"] == 8


@pytest.mark.slow
def test_two_layers_compile_for_tpus(tmp_path):
    pytest.importorskip("libtpu", reason="no TPU compiler here: pip install 'sft_jax[tpu]'")
    outcome = compile_small(tmp_path, "--topology=v5e:2x4")
    assert outcome.fits, outcome.problem
    assert {collective["axes"] for collective in outcome.plan["collectives"]} == {"fsdp"}
