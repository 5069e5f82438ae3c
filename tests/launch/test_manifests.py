"""What `launch/gke.py` gives to kubectl and `launch/sky.py` to sky: of the published shape, and with the run's
arguments as they were given."""

import json
import re
import subprocess
import sys
from pathlib import Path

import gke
import pytest
import sky
import yaml

from sft_jax.command_line import run_command

HARD = ["--config.run.seed=7", """--config.data.chat_template=it's "a" $(HOME) $HOME `b`.jinja"""]
NAMED = {"name": str}
POD_FAILURE_RULE = {
    "action": {"FailJob", "FailIndex", "Ignore", "Count"},
    "onExitCodes": {"containerName": str, "operator": {"In", "NotIn"}, "values": [int]},
    "onPodConditions": [{"type": str}],
}
CONTAINER = {
    "name": str,
    "image": str,
    "command": [str],
    "args": [str],
    "env": [{"name": str, "value": str}],
    "resources": {"limits": {"google.com/tpu": int}},
    "volumeMounts": [{"name": str, "mountPath": str}],
}
POD = {
    "restartPolicy": {"Never"},  # the only one that a podFailurePolicy goes with
    "hostNetwork": bool,
    "dnsPolicy": {"ClusterFirstWithHostNet"},
    "terminationGracePeriodSeconds": int,
    "serviceAccountName": str,
    "nodeSelector": {f"cloud.google.com/gke-{name}": str for name in ("tpu-accelerator", "tpu-topology", "spot")},
    "containers": [CONTAINER],
    "volumes": [{"name": str, "configMap": NAMED}],
}
JOB = {
    "parallelism": int,
    "completions": int,
    "backoffLimit": int,
    "podFailurePolicy": {"rules": [POD_FAILURE_RULE]},
    "template": {"spec": POD},
}
FAILURE_RULE = {
    "name": str,
    "action": {"FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"},
    "onJobFailureReasons": [{"BackoffLimitExceeded", "DeadlineExceeded", "PodFailurePolicy"}],
    "onJobFailureMessagePatterns": [str],
}
JOBSET = {
    "apiVersion": {"jobset.x-k8s.io/v1alpha2"},
    "kind": {"JobSet"},
    "metadata": {"name": str, "annotations": {"alpha.jobset.sigs.k8s.io/exclusive-topology": str}},
    "spec": {
        "failurePolicy": {"maxRestarts": int, "rules": [FAILURE_RULE]},
        "replicatedJobs": [{"name": str, "replicas": int, "template": {"spec": JOB}}],
    },
}
"""The fields that we use of config/components/crd/bases/jobset.x-k8s.io_jobsets.yaml in kubernetes-sigs/jobset (at
08dfbdf), which has batch/v1's Job and core/v1's Pod in it. The whole of it accepted the manifests as well."""
TASK = {
    "name": str,
    "num_nodes": int,
    "resources": {
        "accelerators": str,
        "use_spot": bool,
        "infra": str,
        "job_recovery": {"strategy": str, "max_restarts_on_errors": int, "recover_on_exit_codes": [int]},
    },
    "envs": str,
    "file_mounts": str,
    "setup": str,
    "run": str,
}
"""The fields that we use of sky/utils/schemas.py in skypilot 0.14.1, which accepted the tasks as well. `str` for a
mapping of names that are free."""


def misfits(value, shape, where=""):
    """What of a manifest is not of a shape: a type, the values allowed, [shape of each], or {field: shape}."""
    if isinstance(shape, dict):
        if not isinstance(value, dict):
            return [f"{where}: {value!r} is no mapping"]
        unknown = [f"{where}.{field}: is no field" for field in value if field not in shape]
        known = [(field, f"{where}.{field}") for field in value if field in shape]
        return unknown + [misfit for field, place in known for misfit in misfits(value[field], shape[field], place)]
    if isinstance(shape, list):
        if not isinstance(value, list):
            return [f"{where}: {value!r} is no list"]
        return [m for i, item in enumerate(value) for m in misfits(item, shape[0], f"{where}[{i}]")]
    if isinstance(shape, set):
        return [] if value in shape else [f"{where}: {value!r} is none of {shape}"]
    if shape is str and isinstance(value, dict):
        return [m for field in value for m in misfits(value[field], str, f"{where}.{field}")]
    return [] if type(value) is shape else [f"{where}: {value!r} is no {shape.__name__}"]


def launch_gke(config_file, *args):
    common = ["--name=sft", "--image=registry/sft:1", "--storage=gs://b/s", f"--config={config_file}"]
    return run_command(gke.main, [*common, "--accelerator=tpu-v5p-slice", "--topology=4x4x4", *args])


def applied(fake):
    assert fake.calls == [["kubectl", "apply", "--filename=-"]]
    config_map, jobset = yaml.safe_load_all(fake.inputs[0])
    (slices,) = jobset["spec"]["replicatedJobs"]
    return config_map, jobset, slices, slices["template"]["spec"]["template"]["spec"]


def launch_sky(config_file, *args):
    return run_command(sky.main, ["--name=sft", "--storage=gs://b/s", f"--config={config_file}", *args])


def launched(fake):
    """The task as sky read it."""
    (call,) = fake.calls
    assert call[:4] == ["sky", "jobs", "launch", "--detach-run"]
    return yaml.safe_load(fake.inputs[0])


def test_the_templates_are_of_the_published_shapes():
    assert misfits(yaml.safe_load(gke.TEMPLATE.read_text()), JOBSET) == []
    assert misfits(yaml.safe_load(sky.TEMPLATE.read_text()), TASK) == []


@pytest.mark.parametrize("slices", [1, 2])
def test_slices_are_jobs_and_hosts_are_pods(fake, config_file, slices):
    assert launch_gke(config_file, f"--slices={slices}", "--spot", "--service-account=ksa", "--env=A=$(B)") == 0
    config_map, jobset, replicated, pod = applied(fake)
    assert misfits(jobset, JOBSET) == []
    assert jobset["metadata"]["name"] == "sft"
    assert replicated["replicas"] == slices
    job = replicated["template"]["spec"]
    assert (job["parallelism"], job["completions"], job["backoffLimit"]) == (16, 16, 0)
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5p-slice",
        "cloud.google.com/gke-tpu-topology": "4x4x4",
        "cloud.google.com/gke-spot": "true",
    }
    assert pod["serviceAccountName"] == "ksa"
    (train,) = pod["containers"]
    assert train["image"] == "registry/sft:1"
    assert train["resources"] == {"limits": {"google.com/tpu": 4}}
    assert train["env"] == [{"name": "A", "value": "$$(B)"}]
    (volume,), (mount,) = pod["volumes"], train["volumeMounts"]
    assert volume["name"] == mount["name"]
    assert volume["configMap"]["name"] == config_map["metadata"]["name"] == "sft"
    assert config_map["data"] == {"my config.py": config_file.read_text()}


def test_a_container_gets_the_arguments_as_they_were_given(fake, config_file):
    assert launch_gke(config_file, *HARD) == 0
    (train,) = applied(fake)[3]["containers"]
    assert train["command"] == ["python", "-m", "sft_jax.main"]
    assert [arg.replace("$$", "$") for arg in train["args"]] == [
        *["--config=/experiment/my config.py", "--config.run.distributed=true", "--config.run.dir=gs://b/s/sft"],
        *["--config.run.compilation_cache=gs://b/s/compilation_cache", *HARD],
    ]
    # A dollar that is not doubled begins a variable of Kubernetes.
    assert all("$" not in arg.replace("$$", "") for arg in train["args"])


def test_every_end_of_a_pod_has_its_consequence(fake, config_file):
    """As Kubernetes and JobSet read the rules: the first that matches. The messages are those of
    pkg/controller/job/pod_failure_policy.go in kubernetes/kubernetes."""
    assert launch_gke(config_file) == 0
    _, jobset, replicated, _ = applied(fake)
    pod_rules = replicated["template"]["spec"]["podFailurePolicy"]["rules"]
    policy = jobset["spec"]["failurePolicy"]

    def consequence(exit_code=None, condition=None):
        reason, message = "BackoffLimitExceeded", "Job has reached the specified backoff limit"
        for index, rule in enumerate(pod_rules):
            codes = rule.get("onExitCodes", {}).get("values", [])
            conditions = [pattern["type"] for pattern in rule.get("onPodConditions", [])]
            what = f"failed with exit code {exit_code}" if exit_code in codes else f"has condition {condition}"
            if exit_code in codes or condition in conditions:
                assert rule["action"] == "FailJob"
                reason, message = "PodFailurePolicy", f"Pod n/p {what} matching FailJob rule at index {index}"
                break
        for rule in policy["rules"]:
            patterns = rule.get("onJobFailureMessagePatterns", [""])
            if reason in rule["onJobFailureReasons"] and any(re.search(p, message) for p in patterns):
                return rule["action"]
        return "RestartJobSet"

    assert [consequence(code) for code in (2, 3, 4)] == ["FailJobSet"] * 3
    assert consequence(75) == "RestartJobSetAndIgnoreMaxRestarts"
    assert consequence(condition="DisruptionTarget") == "RestartJobSetAndIgnoreMaxRestarts"
    assert [consequence(code) for code in (1, 5, 6, 20, 23, 134)] == ["RestartJobSet"] * 6
    assert policy["maxRestarts"] > 0


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--topology=4x4x"], "--topology=4x4x --chips-per-host=4: expected a shape such as 4x4x4"),
        (["--topology=3x3"], "--topology=3x3 --chips-per-host=4: expected"),
        (["--name=SFT"], "--name=SFT: pods are called after it"),
        (["--config.run.sed=1"], "config.run has no sed"),
    ],
)
def test_what_the_cluster_would_refuse_is_refused_before(fake, config_file, capfd, args, message):
    assert launch_gke(config_file, *args) == 2
    assert message in capfd.readouterr().err
    assert fake.calls == []


def test_a_task_has_the_hardware_and_goes_on_after_75_only(fake, config_file):
    assert launch_sky(config_file, "--accelerators=A100:4", "--nodes=3", "--spot", "--infra=gcp", "--env=A=b c") == 0
    task = launched(fake)
    assert misfits(task, TASK) == []
    assert task["resources"] == {
        "accelerators": "A100:4",
        "use_spot": True,
        "job_recovery": {"max_restarts_on_errors": 0, "recover_on_exit_codes": [75]},
        "infra": "gcp",
    }
    assert task["num_nodes"] == 3
    assert task["envs"] == {"A": "b c"}
    assert task["file_mounts"] == {"/tmp/sft_jax_experiment.py": str(config_file)}
    assert "'sft_jax[cuda]'" in task["setup"]


@pytest.mark.parametrize("accelerators", ["H100:8", "tpu-v6e-8"])
def test_a_node_runs_the_arguments_as_they_were_given(fake, config_file, tmp_path, accelerators):
    """What sky would run is run, by bash, on a node with another before it."""
    assert launch_sky(config_file, f"--accelerators={accelerators}", *HARD) == 0
    task = launched(fake)
    python = tmp_path / ".sft_jax_venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    lines = [f"#!{sys.executable} -IS", "import json, os, sys", "print(json.dumps([sys.argv[1:], dict(os.environ)]))"]
    python.write_text("\n".join(lines))
    python.chmod(0o755)
    node = {"SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1"}
    env = {"HOME": str(tmp_path), "PATH": "/usr/bin:/bin", **node}
    out = subprocess.run(["/bin/bash", "-c", task["run"]], env=env, text=True, capture_output=True)
    argv, seen = json.loads(out.stdout)
    assert argv == [
        *["-m", "sft_jax.main", "--config=/tmp/sft_jax_experiment.py", "--config.run.distributed=true"],
        *["--config.run.dir=gs://b/s/sft", "--config.run.compilation_cache=gs://b/s/compilation_cache", *HARD],
    ]
    others = {name: value for name, value in seen.items() if name.startswith("JAX_")}
    assert others == (
        {}  # TPU VMs know each other
        if accelerators.startswith("tpu")
        else {"JAX_COORDINATOR_ADDRESS": "10.0.0.1:8476", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}
    )


@pytest.mark.parametrize("key", ["spec", "resources"])
def test_the_check_of_shapes_can_fail(key):
    shape = {"spec": JOBSET, "resources": TASK}[key]
    manifest = yaml.safe_load((gke if key == "spec" else sky).TEMPLATE.read_text())
    manifest[key]["no_such_field"] = 1
    assert misfits(manifest, shape) == [f".{key}.no_such_field: is no field"]
    assert misfits([1, "a"], [int]) == ["[1]: 'a' is no int"]
    assert misfits("x", {"y"}) == [": 'x' is none of {'y'}"]


def test_the_image_runs_what_the_manifest_runs():
    dockerfile = Path(gke.TEMPLATE).with_name("Dockerfile").read_text()
    command = next(line for line in dockerfile.splitlines() if line.startswith("ENTRYPOINT "))
    (train,) = yaml.safe_load(gke.TEMPLATE.read_text())["spec"]["replicatedJobs"][0]["template"]["spec"]["template"][
        "spec"
    ]["containers"]
    assert json.loads(command.removeprefix("ENTRYPOINT ")) == train["command"]
    root = Path(__file__).parents[2]
    copies = [line.split()[1:-1] for line in dockerfile.splitlines() if line.startswith("COPY ")]
    sources = [source for copied in copies if "--from=wheel" not in copied for source in copied]
    assert sources
    assert [source for source in sources if not (root / source).exists()] == []
