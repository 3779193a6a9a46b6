"""`soma train --print-launch`: one recipe, five ways to start it."""

import copy
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import kubernetes_validate as validate
import pytest
import yaml
from typer.testing import CliRunner

from soma.cli import app
from soma.train.parallel.launch import Launch

RECIPE = """
name: Wide
base: some/model
data: {sources: [x.txt]}
train: {batch_size: 16, layout: {fsdp: -1, tp: 2}}
"""
JOB = Launch("wide", ("train", "a recipe.yaml", "--runs", "/runs"), 2, 4, True, "/runs", "registry/soma:1")


def call(tmp_path: Path, *options: str) -> tuple[int, str]:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE)
    result = CliRunner().invoke(app, ["train", str(recipe), "--runs", str(tmp_path / "runs"), *options])
    return result.exit_code, result.output or str(result.exception)


def test_torchrun(tmp_path: Path) -> None:
    code, text = call(tmp_path, "--print-launch", "torchrun", "--ranks-per-node", "8", "--set", "train.steps=5")
    assert code == 0
    assert text == (
        f"torchrun --standalone --nproc-per-node=8 --max-restarts=3 -m soma.cli train {tmp_path}/recipe.yaml "
        f"--runs {tmp_path}/runs --set train.steps=5\n"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--ranks-per-node", "3"), r"layout: fsdp takes the ranks that are left, but 3 ranks / (tp 2 = 2) = 1.5"),
        (("--ranks-per-node", "64"), "batch_size 16 is not a multiple of microbatch_size × dp × fsdp = 1 × 1 × 32"),
    ],
)  # fmt: skip
def test_layout_is_checked(tmp_path: Path, options: tuple[str, ...], message: str) -> None:
    code, text = call(tmp_path, "--print-launch", "torchrun", *options)
    assert code != 0
    assert message in text
    assert (
        "there are torchrun, slurm, kubernetes, jobset, pytorchjob"
        in call(tmp_path, "--print-launch", "pbs", "--ranks-per-node", "8")[1]
    )


def test_slurm() -> None:
    text = JOB.text("slurm")
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)
    assert "#SBATCH --nodes=2\n" in text
    assert "#SBATCH --gpus-per-node=4\n" in text
    assert text.endswith(
        "srun --kill-on-bad-exit=1 torchrun --nnodes=2 --rdzv-backend=c10d --rdzv-id=wide "
        '--rdzv-endpoint="$first:29500" '
        "--nproc-per-node=4 --max-restarts=3 -m soma.cli train 'a recipe.yaml' --runs /runs\n"
    )


@pytest.mark.parametrize(
    ("name", "plain"), [("a.b_c-", "a-b-c"), ("2nd", "run-2nd"), ("x" * 64, "x" * 50)]
)  # fmt: skip
def test_names_of_kubernetes(name: str, plain: str) -> None:
    """A run may be called what a service may not."""
    job = replace(JOB, name=name)
    for kind in ("kubernetes", "jobset", "pytorchjob"):
        first, *_ = yaml.safe_load_all(job.text(kind))
        assert first["metadata"]["name"] == plain
        assert f"claimName: {plain}-runs" in job.text(kind)
    service, pods = yaml.safe_load_all(job.text("kubernetes"))
    spec = pods["spec"]["template"]["spec"]
    assert spec["subdomain"] == service["metadata"]["name"]
    assert f"--rdzv-endpoint={plain}-0.{plain}:29500" in spec["containers"][0]["command"]


def test_kubernetes() -> None:
    """Both objects fit the schemas of Kubernetes 1.33, and a spoilt one does not."""
    service, job = yaml.safe_load_all(JOB.text("kubernetes"))
    for thing in (service, job):
        validate.validate(thing, "1.33", strict=True)
    assert job["spec"]["completions"] == 2
    container = job["spec"]["template"]["spec"]["containers"][0]
    assert "--rdzv-endpoint=wide-0.wide:29500" in container["command"]
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 4}
    assert service["spec"]["selector"] == job["spec"]["template"]["metadata"]["labels"]
    job["spec"]["parallelism"] = "two"
    with pytest.raises(validate.ValidationError):
        validate.validate(job, "1.33", strict=True)


# --- The operators' own kinds. kubernetes-validate has no schemas of them, so the parts that we write are spelled out
# here from their API types: kubernetes-sigs/jobset api/jobset/v1alpha2, kubeflow/training-operator kubeflow.org/v1.

POLICY = {"maxRestarts": int}
JOBSET = {
    "replicatedJobs": [{"name": str, "replicas": int, "template": {"spec": "job"}}],
    "network": {"enableDNSHostnames": bool, "subdomain": str, "publishNotReadyAddresses": bool},
    "failurePolicy": POLICY,
}  # fmt: skip
PYTORCHJOB = {
    "nprocPerNode": str,
    "runPolicy": {"cleanPodPolicy": ("None", "Running", "All")},
    "elasticPolicy": {
        "minReplicas": int, "maxReplicas": int, "rdzvBackend": ("c10d", "etcd", "etcd-v2"), "rdzvPort": int,
        "maxRestarts": int,
    },
    "pytorchReplicaSpecs": {
        "Worker": {"replicas": int, "restartPolicy": ("Always", "OnFailure", "Never", "ExitCode"), "template": "pod"}
    },
}  # fmt: skip
KINDS = {"JobSet": ("jobset.x-k8s.io/v1alpha2", JOBSET), "PyTorchJob": ("kubeflow.org/v1", PYTORCHJOB)}


def check(value: Any, schema: Any, place: str) -> None:
    """Raise AssertionError where a value has another type or a key that the API does not know."""
    if schema == "job":
        job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}, "spec": value}
        validate.validate(job, "1.33", strict=True)
    elif schema == "pod":
        validate.validate(
            {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "x"}, "template": value}, "1.33",
            strict=True,
        )  # fmt: skip
    elif isinstance(schema, dict):
        assert isinstance(value, dict), place
        assert value.keys() <= schema.keys(), f"{place}: {value.keys() - schema.keys()}"
        for key, inner in value.items():
            check(inner, schema[key], f"{place}.{key}")
    elif isinstance(schema, list):
        assert isinstance(value, list), place
        for number, inner in enumerate(value):
            check(inner, schema[0], f"{place}[{number}]")
    elif isinstance(schema, tuple):
        assert value in schema, f"{place}: {value}"
    else:
        assert type(value) is schema, f"{place}: {value!r}"


def manifest(job: Launch, kind: str) -> dict[str, Any]:
    """The launch's object, checked."""
    made = yaml.safe_load(job.text(kind))
    version, schema = KINDS[made["kind"]]
    assert made["apiVersion"] == version
    check(made["spec"], schema, made["kind"])
    for spoil in ("replicatedJobs", "pytorchReplicaSpecs"):  # the check is one
        if spoil in made["spec"]:
            spoilt = copy.deepcopy(made["spec"])
            spoilt[spoil + "s"] = spoilt.pop(spoil)
            with pytest.raises(AssertionError, match=spoil):
                check(spoilt, schema, made["kind"])
    return made


def test_jobset() -> None:
    spec = manifest(JOB, "jobset")["spec"]
    job = spec["replicatedJobs"][0]["template"]["spec"]
    assert spec["failurePolicy"] == {"maxRestarts": 3}
    assert (job["completions"], job["backoffLimit"]) == (2, 0)
    words = job["template"]["spec"]["containers"][0]["command"]
    assert "--rdzv-endpoint=wide-ranks-0-0.wide:29500" in words
    assert "--nnodes=2" in words
    elastic = manifest(replace(JOB, nodes=4, min_nodes=2), "jobset")["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert elastic["backoffLimit"] == 12
    assert "--nnodes=2:4" in elastic["template"]["spec"]["containers"][0]["command"]
    job["template"]["spec"]["containers"][0]["port"] = 1
    with pytest.raises(validate.ValidationError):
        check(spec, JOBSET, "JobSet")


def test_pytorchjob() -> None:
    spec = manifest(replace(JOB, nodes=4, min_nodes=2), "pytorchjob")["spec"]
    assert (spec["elasticPolicy"]["minReplicas"], spec["elasticPolicy"]["maxReplicas"]) == (2, 4)
    worker = spec["pytorchReplicaSpecs"]["Worker"]
    assert worker["replicas"] == 4
    container = worker["template"]["spec"]["containers"][0]
    assert container["name"] == "pytorch"
    assert container["ports"][0]["name"] == "pytorchjob-port"
    assert container["command"] == ["torchrun", "-m", "soma.cli", "train", "a recipe.yaml", "--runs", "/runs"]
    assert spec["nprocPerNode"] == "4"


def test_elastic(tmp_path: Path) -> None:
    """Every number of nodes that may be left must do."""
    options = ("--print-launch", "torchrun", "--ranks-per-node", "4", "--nodes", "4")
    code, text = call(tmp_path, *options, "--min-nodes", "4")
    assert code == 0
    assert "--nnodes=4 " in text
    code, text = call(tmp_path, *options, "--min-nodes", "1")
    assert code != 0
    assert "could come to have 3 nodes, and there train: batch_size 16 is not a multiple of" in text
    assert "It works on 1, 2, 4" in text
    code, text = call(tmp_path, *options, "--min-nodes", "1", "--set", "train.batch_size=48")
    assert "--nnodes=1:4 " in text
    assert "more than --nodes 4" in call(tmp_path, *options, "--min-nodes", "5")[1]
    script = replace(JOB, nodes=4, min_nodes=2).text("slurm")
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    assert "#SBATCH --no-kill\n" in script
    assert "export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1\n" in script
    assert "srun --no-kill --kill-on-bad-exit=0 torchrun --nnodes=2:4 " in script
