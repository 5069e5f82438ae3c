"""`launch/slurm.py` against an sbatch that only writes down what it is asked, and the batch script against srun so."""

import os
import subprocess
from pathlib import Path

import pytest
import slurm

from sft_jax.command_line import run_command

SCRIPT = Path(slurm.__file__).with_name("slurm.sh")
HARD = ["--config.run.seed=7", """--config.data.chat_template=it's "a" $HOME `b`.jinja"""]


def test_a_job_is_submitted_with_a_task_for_each_gpu(fake, config_file):
    args = ["--name=sft", "--nodes=2", "--gpus-per-node=4", "--time=8:00:00", "--python=/venv/bin/python"]
    args += ["--storage=/shared/sft", "--sbatch-flag=--partition=gpu", "--env=A=b c", f"--config={config_file}", *HARD]
    assert run_command(slurm.main, args) == 0
    assert fake.calls == [
        [
            *["sbatch", "--job-name=sft", "--nodes=2", "--gpus-per-node=4", "--ntasks-per-node=4", "--time=8:00:00"],
            *["--partition=gpu", str(SCRIPT), "env", "A=b c", "/venv/bin/python", "-m", "sft_jax.main"],
            *[f"--config={config_file}", "--config.run.distributed=true", "--config.run.dir=/shared/sft/sft"],
            *["--config.run.compilation_cache=/shared/sft/compilation_cache", *HARD],
        ]
    ]


@pytest.mark.parametrize("status", [0, 75, 2, 3, 4, 134])
def test_only_what_was_preempted_goes_back_into_the_queue(fake, tmp_path, monkeypatch, status):
    cluster = type(fake)(tmp_path, monkeypatch, "srun", "scontrol")
    cluster.answer(run=[{"status": status}])
    env = os.environ | {"SLURM_JOB_ID": "12"}
    result = subprocess.run(["/bin/bash", str(SCRIPT), "run", *HARD], env=env, stdin=subprocess.DEVNULL)
    assert result.returncode == status
    requeued = [["scontrol", "requeue", "12"]] if status == 75 else []
    assert cluster.calls == [["srun", "run", *HARD], *requeued]


def test_the_tasks_and_not_the_script_are_told_to_stop():
    """With `B:` before it, only the batch shell would get the signal."""
    directives = [line.split()[1] for line in SCRIPT.read_text().splitlines() if line.startswith("#SBATCH ")]
    assert directives == ["--requeue", "--open-mode=append", "--signal=TERM@300"]
