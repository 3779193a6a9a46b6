"""`soma train --print-launch`: one recipe, three ways to start it."""

import subprocess
from pathlib import Path

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
        "there are torchrun, slurm, kubernetes" in call(tmp_path, "--print-launch", "pbs", "--ranks-per-node", "8")[1]
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
