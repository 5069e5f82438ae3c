"""`launch/tpu.py` against a gcloud that only writes down what it is asked: exact calls, and what follows each end."""

import subprocess

import pytest
import tpu

from sft_jax.command_line import run_command

NOT_FOUND = {"status": 1, "err": "ERROR: (gcloud.compute.tpus.describe) NOT_FOUND: Resource 'r' was not found"}
HARD = ["--config.run.seed=7", """--config.data.chat_template=it's "a" $HOME `b`.jinja"""]


def state(name):
    return {"out": name}


def launch(config_file, *args):
    common = ["--name=sft", "--zone=z", "--storage=gs://b/s/", "--poll-seconds=0"]
    return run_command(tpu.main, [*common, f"--config={config_file}", *args])


def launch_queued(config_file, *args):
    return launch(config_file, "--accelerator=v6e-16", "--queued", *args)


def verbs(fake):
    return [call[4] for call in fake.calls]


def test_a_slice_is_made_used_on_all_workers_and_deleted(fake, config_file):
    fake.answer(describe=[NOT_FOUND, state("READY")])
    assert launch(config_file, "--accelerator=v5p-16", "--project=p") == 0
    group, place = ["gcloud", "compute", "tpus", "tpu-vm"], ["--zone=z", "--project=p"]
    describe, create, again, scp, ssh, delete = fake.calls
    assert describe == again == [*group, "describe", "sft", "--format=value(state)", *place]
    assert create == [
        *[*group, "create", "sft", "--version=v2-alpha-tpuv5", "--accelerator-type=v5p-16"],
        *place,
    ]
    assert scp == [*group, "scp", str(config_file), "sft:sft_jax_experiment.py", "--worker=all", *place]
    assert ssh[:7] == [*group, "ssh", "sft", "--worker=all"]
    assert ssh[-3].startswith("--command=python3 -m pip install ")
    assert ssh[-2:] == place
    assert delete == [*group, "delete", "sft", "--quiet", *place]


def test_a_queued_resource_is_waited_for(fake, config_file):
    fake.answer(describe=[NOT_FOUND, state("WAITING_FOR_RESOURCES"), state("PROVISIONING"), state("ACTIVE")])
    assert launch_queued(config_file, "--spot", "--slices=2", "--create-flag=--internal-ips", "--keep") == 0
    assert verbs(fake) == ["describe", "create", *["describe"] * 3, "scp", "ssh"]
    group = ["gcloud", "compute", "tpus", "queued-resources"]
    assert fake.calls[0] == [*group, "describe", "sft", "--format=value(state.state)", "--zone=z"]
    assert fake.calls[1] == [
        *[*group, "create", "sft", "--runtime-version=v2-alpha-tpuv6e", "--node-count=2", "--node-prefix=sft"],
        *["--accelerator-type=v6e-16", "--spot", "--internal-ips", "--zone=z"],
    ]
    # Batches of gcloud's own choice would wait for each other.
    for call in fake.calls[-2:]:
        assert {"--worker=all", "--node=all", "--batch-size=all"} <= set(call)


def test_what_is_taken_away_is_asked_for_again_and_the_run_goes_on(fake, config_file, capfd):
    fake.answer(
        describe=[state("ACTIVE"), state("SUSPENDING"), state("SUSPENDING"), state("SUSPENDED"), state("ACTIVE")],
        ssh=[{"status": 255}, {}],
    )
    assert launch_queued(config_file, "--max-failures=0") == 0
    assert verbs(fake) == [
        *["describe", "scp", "ssh", "describe"],  # the run ends, and the machines are going
        *["describe", "describe", "delete", "create", "describe"],
        *["scp", "ssh", "delete"],
    ]
    runs = [call for call in fake.calls if call[4] == "ssh"]
    assert runs[0] == runs[1]
    assert "sft: the machines are gone; going on from the last checkpoint" in capfd.readouterr().out


def test_a_run_that_was_told_to_stop_goes_on_where_it_was(fake, config_file):
    fake.answer(describe=[state("ACTIVE")] * 6, ssh=[{"status": 75}, {"status": 75}, {}])
    assert launch_queued(config_file, "--max-failures=0") == 0
    assert verbs(fake) == [*["describe", "scp", "ssh", "describe"] * 2, "describe", "scp", "ssh", "delete"]


@pytest.mark.parametrize("status", [2, 3, 4])
def test_what_would_end_so_again_is_not_tried_again(fake, config_file, capfd, status):
    fake.answer(describe=[state("ACTIVE")], ssh=[{"status": status}])
    assert launch_queued(config_file) == status
    assert verbs(fake) == ["describe", "scp", "ssh"]
    assert "still there, and paid for: gcloud compute tpus queued-resources delete sft" in capfd.readouterr().out


@pytest.mark.parametrize("failing", ["ssh", "scp"])
def test_other_failures_are_tried_again_so_often_and_no_more(fake, config_file, failing):
    fake.answer(describe=[state("ACTIVE")] * 9, **{failing: [{"status": 1}] * 9})
    assert launch_queued(config_file, "--max-failures=2") == 1
    assert verbs(fake).count(failing) == 3
    assert "delete" not in verbs(fake)


def test_an_error_of_gcloud_is_not_taken_for_a_name_that_is_free(fake, config_file, capfd):
    fake.answer(describe=[{"status": 1, "err": "PERMISSION_DENIED"}])
    assert launch_queued(config_file) == 1
    assert verbs(fake) == ["describe"]
    assert "error: gcloud cannot describe sft: PERMISSION_DENIED" in capfd.readouterr().err


def test_a_request_that_is_refused_ends_it(fake, config_file, capfd):
    fake.answer(describe=[NOT_FOUND], create=[{"status": 1}])
    assert launch_queued(config_file) == 1
    assert verbs(fake) == ["describe", "create"]
    assert "exit status 1" in capfd.readouterr().err


def test_a_worker_gets_the_arguments_as_they_were_given(fake, config_file, tmp_path, monkeypatch):
    """What gcloud was told to run is run, by a shell."""
    wheel = tmp_path / "sft_jax-1-py3-none-any.whl"
    fake.answer(describe=[state("ACTIVE")])
    args = [f"--package={wheel}", "--env=MODEL_DIR=a b", "--config.run.dir=gs://mine", *HARD]
    assert launch_queued(config_file, *args) == 0
    assert fake.calls[2][5:7] == [str(wheel), f"sft:{wheel.name}"]
    ssh = fake.calls[3]
    (command,) = (arg.removeprefix("--command=") for arg in ssh if arg.startswith("--command="))
    (tmp_path / "worker").mkdir()
    worker = type(fake)(tmp_path / "worker", monkeypatch, "python3", "flock")
    assert subprocess.run(["/bin/bash", "-c", command]).returncode == 0
    *_, install, train = worker.calls
    assert install[-2:] == [f"./{wheel.name}[tpu]", "gcsfs"]
    assert train == [
        *["flock", "--wait=600", ".sft_jax.lock", "env", "MODEL_DIR=a b", ".sft_jax_venv/bin/python"],
        *["-m", "sft_jax.main", "--config=sft_jax_experiment.py", "--config.run.distributed=true"],
        *["--config.run.compilation_cache=gs://b/s/compilation_cache", "--config.run.dir=gs://mine", *HARD],
    ]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--accelerator=v9-8"], "the runtime version of v9 is not known; known are v4, v5litepod, v5p, v6e"),
        (["--accelerator=v6e-8", "--slices=2"], "--slices=2: several slices come from a queue only"),
        (["--accelerator=v6e-8", "--zonne=x"], "--zonne=x: is no option of python launch/tpu.py"),
        (["--accelerator=v6e-8", "--config.run.sed=1"], "config.run has no sed. Did you mean seed?"),
        (["--accelerator=v6e-8", "--config.batch.batch_size=0"], "config.batch.batch_size"),
        (["--accelerator=v6e-8", "--storage=runs"], "--storage=runs: a machine that is rented has no such folder"),
        (["--accelerator=v6e-8", "--env=A"], "--env=A: expected NAME=VALUE"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_rented(fake, config_file, capfd, args, message):
    fake.answer(describe=[])
    assert launch(config_file, *args) == 2
    assert message in capfd.readouterr().err
    assert fake.calls == []
