"""How a recipe is started on many ranks: `torchrun`, a SLURM script, a Kubernetes manifest. Loads no torch."""

import os
import shlex
from dataclasses import dataclass

import yaml

from soma.base.errors import UserError

PORT = 29500
RESTARTS = 3  # of a job that has lost a rank; it goes on from its last checkpoint


def launched() -> bool:
    """Whether `torchrun` started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


@dataclass(frozen=True)
class Launch:
    """A job: `arguments` of the command `soma` on `nodes` machines with `ranks_per_node` processes each.

    `name` is the run's. `runs` is the folder that all nodes must see under this path. GPUs: one for each rank, or none.
    """

    name: str
    arguments: tuple[str, ...]
    nodes: int
    ranks_per_node: int
    gpus: bool
    runs: str
    image: str

    def soma(self, rendezvous: str) -> list[str]:
        """The words of the command on one node; `rendezvous` is host:port of the first."""
        where = ["--standalone"] if self.nodes == 1 else [
            f"--nnodes={self.nodes}", "--rdzv-backend=c10d", f"--rdzv-id={self.name}", f"--rdzv-endpoint={rendezvous}",
        ]  # fmt: skip
        return [
            "torchrun", *where, f"--nproc-per-node={self.ranks_per_node}", f"--max-restarts={RESTARTS}",
            "-m", "soma.cli", *self.arguments,
        ]  # fmt: skip

    def text(self, kind: str) -> str:
        """The launch as `torchrun`, `slurm` or `kubernetes`."""
        makers = {"torchrun": self.torchrun, "slurm": self.slurm, "kubernetes": self.kubernetes}
        if kind not in makers:
            raise UserError(f"--print-launch {kind}: there are {', '.join(makers)}")
        return makers[kind]()

    def torchrun(self) -> str:
        """The command for every node."""
        command = shlex.join(self.soma("FIRST_NODE:" + str(PORT)))
        if self.nodes == 1:
            return command + "\n"
        return f"# on each of the {self.nodes} nodes; FIRST_NODE is the name of one of them\n{command}\n"

    def slurm(self) -> str:
        """A script for sbatch: one task, an agent of torchrun, on each node."""
        command = " ".join(
            word if word.startswith("--rdzv-endpoint") else shlex.quote(word) for word in self.soma(f'"$first:{PORT}"')
        )
        gpus = [f"#SBATCH --gpus-per-node={self.ranks_per_node}"] if self.gpus else []
        lines = [
            "#!/bin/bash",
            f"#SBATCH --job-name={self.name}",
            f"#SBATCH --nodes={self.nodes}",
            "#SBATCH --ntasks-per-node=1",
            *gpus,
            "#SBATCH --requeue",
            "#SBATCH --open-mode=append",
            "set -euo pipefail",
            'first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)',
            f"srun --kill-on-bad-exit=1 {command}",
        ]
        return "\n".join(lines) + "\n"

    def kubernetes(self) -> str:
        """An indexed Job, one pod a node, and the headless Service by which they find the first. No operator is needed.

        The runs folder is a claim named NAME-runs that all pods may write.
        """
        first = f"{self.name}-0.{self.name}"
        container: dict[str, object] = {
            "name": "train",
            "image": self.image,
            "command": self.soma(f"{first}:{PORT}"),
            "ports": [{"containerPort": PORT}],
            "volumeMounts": [{"name": "runs", "mountPath": self.runs}, {"name": "shm", "mountPath": "/dev/shm"}],
        }
        if self.gpus:
            container["resources"] = {"limits": {"nvidia.com/gpu": self.ranks_per_node}}
        pod = {
            "subdomain": self.name,
            "restartPolicy": "Never",
            "containers": [container],
            "volumes": [
                {"name": "runs", "persistentVolumeClaim": {"claimName": f"{self.name}-runs"}},
                {"name": "shm", "emptyDir": {"medium": "Memory"}},
            ],
        }
        labels = {"app.kubernetes.io/name": self.name}
        service = {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": self.name, "labels": labels},
            "spec": {
                "clusterIP": "None",
                "publishNotReadyAddresses": True,
                "selector": labels,
                "ports": [{"name": "rendezvous", "port": PORT}],
            },
        }
        job = {
            "apiVersion": "batch/v1",
            "kind": "Job",
            "metadata": {"name": self.name, "labels": labels},
            "spec": {
                "completionMode": "Indexed",
                "completions": self.nodes,
                "parallelism": self.nodes,
                "backoffLimit": RESTARTS * self.nodes,
                "template": {"metadata": {"labels": labels}, "spec": pod},
            },
        }
        return yaml.safe_dump_all([service, job], sort_keys=False)
