"""What is tried, on a model of the compiler that costs nothing."""

import re
from pathlib import Path

import pytest

from sft_jax.command_line import read_config
from sft_jax.datatypes import ConfigError
from sft_jax.model.presets import preset_config
from sft_jax.planning.cases import Case as PlannedCase
from sft_jax.planning.cases import Outcome, run_case
from sft_jax.planning.search import search

CONFIGS = Path(__file__).parents[2] / "configs"
KEPT = {"offload": 0, "full": 2, "attention": 4, "dots": 12, "none": 20}
SECONDS = {"offload": 1.4, "full": 1.3, "attention": 1.2, "dots": 1.1, "none": 1.0}


def try_all(hbm, rows=64, name="70b", killed=""):
    """(outcomes, the cases in the order in which they were run)"""
    config = read_config([f"--config={CONFIGS}/{name}.py", f"--config.batch.batch_size={rows}"])
    model, run_cases = preset_config(config.model.preset, {}), []

    def compile_quickly(case):
        run_cases.append(case.label)
        assert case.args[:2] == ("--config=x", "--topology=y")
        get = lambda field: re.search(rf"{field}=(\w+)", " ".join(case.args))[1]  # noqa: E731
        fsdp, tensor, steps = (int(get(field)) for field in ("mesh.fsdp", "mesh.tensor", "grad_accum_steps"))
        assert fsdp * tensor * int(get("mesh.expert")) == 64
        assert rows % (fsdp * steps) == 0
        if killed and killed in case.label:
            return Outcome(case, None, "the compiler was ended by SIGKILL")
        peak = 5 + KEPT[get("remat")] * rows // (fsdp * steps)
        fits = peak <= hbm
        plan = {"fits": fits, "peak_bytes": peak, "step_seconds": SECONDS[get("remat")] * tensor * (1 + steps / 10)}
        return Outcome(case, plan if fits else plan | {"step_seconds": 0.0})

    return search(["--config=x", "--topology=y"], config, model, 64, compile_quickly), run_cases


def test_the_fastest_that_fits_comes_first():
    found, order = try_all(hbm=18)
    assert found[0].case.label == "fsdp 64, tensor 1, 1 microbatch, dots"
    assert [outcome.fits for outcome in found] == sorted((outcome.fits for outcome in found), reverse=True)
    assert order[0] == "fsdp 64, tensor 1, 1 microbatch, full"
    assert "fsdp 64, tensor 1, 1 microbatch, none" in order  # which is where it ends: 25 of 18
    assert len(order) == len(set(order)) == len(found)


def test_more_rows_at_a_time_are_tried_as_long_as_fewer_fit():
    order = try_all(hbm=8, rows=256)[1]
    full = [label for label in order if label.endswith("full")]
    assert full[:2] == ["fsdp 64, tensor 1, 4 microbatches, full", "fsdp 64, tensor 1, 2 microbatches, full"]
    assert full[2].startswith("fsdp 32")  # 2 rows need 9 of 8, so that 4 are not tried


def test_where_nothing_fits_the_hosts_memory_is_tried():
    found, order = try_all(hbm=6)
    assert order[-1] == "fsdp 64, tensor 1, 1 microbatch, offload"
    assert [outcome.case.label for outcome in found if outcome.fits] == [order[-1]]


def test_a_compiler_that_was_killed_is_a_row():
    found, _ = try_all(hbm=18, killed="tensor 2")
    assert found[0].fits
    assert any("SIGKILL" in outcome.problem for outcome in found)


def test_experts_are_split_too():
    order = try_all(hbm=100, rows=64, name="mixtral_8x7b")[1]
    assert "fsdp 8, tensor 1, expert 8, 8 microbatches, full" in order


def test_a_batch_that_divides_nowhere_is_refused():
    with pytest.raises(ConfigError, match="3 rows divide over no mesh of 64"):
        try_all(hbm=10, rows=3)


def test_a_child_that_ends_badly_says_how(monkeypatch, tmp_path):
    missing = run_case(PlannedCase("x", ("--config=nothing.py", "--topology=cpu:1")))
    assert (missing.plan, missing.fits) == (None, False)
    assert missing.problem.startswith("--config=nothing.py: no such file")
    (tmp_path / "config.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)\n")
    killed = run_case(PlannedCase("x", (f"--config={tmp_path}/config.py", "--topology=cpu:1")))
    assert killed.problem == "the compiler was ended by SIGKILL, as the system does where memory ends"
