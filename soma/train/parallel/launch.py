"""How a recipe is started on many ranks: `torchrun`, a SLURM script, Kubernetes manifests. Loads no torch."""

import os
import re
import shlex
from dataclasses import dataclass
from typing import Any

import yaml

from soma.base.errors import UserError

PORT = 29500
REPLICATED = "ranks"  # the name of a JobSet's only job
# Agents of torchrun that share their store with the ranks tell its address in the first round alone, so a node that
# comes later waits for it until all fail (torch 2.13).
OWN_STORE = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
MOST = 50  # characters of a Kubernetes name: with what operators put behind it, a pod's stays within 63
RESTARTS = 3  # of a job that has lost a rank; it goes on from its last checkpoint


def world_size() -> int:
    """How many processes `torchrun` has started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def launched() -> bool:
    """Whether `torchrun` started this process as one of several."""
    return world_size() > 1


@dataclass(frozen=True)
class Launch:
    """A job: `arguments` of the command `soma` on `nodes` machines with `ranks_per_node` processes each.

    `name` is the run's. `runs` is the folder that all nodes must see under this path. GPUs: one for each rank, or none.
    `min_nodes`: with so many the job goes on, from its last checkpoint, when others are lost; None: with all alone.
    """

    name: str
    arguments: tuple[str, ...]
    nodes: int
    ranks_per_node: int
    gpus: bool
    runs: str
    image: str
    min_nodes: int | None = None

    @property
    def fewest(self) -> int:
        """Machines that the job cannot do without."""
        return self.min_nodes or self.nodes

    @property
    def is_elastic(self) -> bool:
        return self.fewest < self.nodes

    def soma(self, rendezvous: str) -> list[str]:
        """The words of the command on one node; `rendezvous` is host:port of the first."""
        nodes = f"{self.fewest}:{self.nodes}" if self.is_elastic else str(self.nodes)
        where = ["--standalone"] if self.nodes == 1 else [
            f"--nnodes={nodes}", "--rdzv-backend=c10d", f"--rdzv-id={self.name}", f"--rdzv-endpoint={rendezvous}",
        ]  # fmt: skip
        return [
            "torchrun", *where, f"--nproc-per-node={self.ranks_per_node}", f"--max-restarts={RESTARTS}",
            "-m", "soma.cli", *self.arguments,
        ]  # fmt: skip

    def text(self, kind: str) -> str:
        """The launch as `torchrun`, `slurm`, `kubernetes`, `jobset` or `pytorchjob`."""
        makers = {
            "torchrun": self.torchrun, "slurm": self.slurm, "kubernetes": self.kubernetes, "jobset": self.jobset,
            "pytorchjob": self.pytorchjob,
        }  # fmt: skip
        if kind not in makers:
            raise UserError(f"--print-launch {kind}: there are {', '.join(makers)}")
        return makers[kind]()

    def torchrun(self) -> str:
        """The command for every node."""
        command = shlex.join(self.soma("FIRST_NODE:" + str(PORT)))
        if self.nodes == 1:
            return command + "\n"
        own = " ".join(f"{name}={value}" for name, value in OWN_STORE.items())
        return f"# on each of the {self.nodes} nodes; FIRST_NODE is the name of one of them\n{own} {command}\n"

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
            *(["#SBATCH --no-kill"] if self.is_elastic else []),
            "#SBATCH --requeue",
            "#SBATCH --open-mode=append",
            "set -euo pipefail",
            *(f"export {name}={value}" for name, value in OWN_STORE.items()),
            'first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)',
            f"srun {'--no-kill --kill-on-bad-exit=0' if self.is_elastic else '--kill-on-bad-exit=1'} {command}",
        ]
        return "\n".join(lines) + "\n"

    def kubernetes(self) -> str:
        """An indexed Job, one pod a node, and the headless Service by which they find the first. No operator is needed.

        The runs folder is a claim named NAME-runs that all pods may write, here and in the other manifests.
        """
        service = {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": self.metadata,
            "spec": {
                "clusterIP": "None",
                "publishNotReadyAddresses": True,
                "selector": self.labels,
                "ports": [{"name": "rendezvous", "port": PORT}],
            },
        }
        pod = {"subdomain": self.object_name, **self.pod("train", f"{self.object_name}-0.{self.object_name}")}
        job = {
            "apiVersion": "batch/v1",
            "kind": "Job",
            "metadata": self.metadata,
            "spec": self.job(pod, RESTARTS * self.nodes),
        }
        return yaml.safe_dump_all([service, job], sort_keys=False)

    def jobset(self) -> str:
        """A JobSet (jobset.x-k8s.io/v1alpha2), whose operator makes the service and starts all pods anew at once when
        one is lost; an elastic job replaces the lost pod alone."""
        pod = self.pod("train", f"{self.object_name}-{REPLICATED}-0-0.{self.object_name}")
        jobset = {
            "apiVersion": "jobset.x-k8s.io/v1alpha2",
            "kind": "JobSet",
            "metadata": self.metadata,
            "spec": {
                "network": {
                    "enableDNSHostnames": True,
                    "publishNotReadyAddresses": True,
                    "subdomain": self.object_name,
                },
                "failurePolicy": {"maxRestarts": RESTARTS},
                "replicatedJobs": [
                    {
                        "name": REPLICATED,
                        "replicas": 1,
                        "template": {"spec": self.job(pod, RESTARTS * self.nodes if self.is_elastic else 0)},
                    }
                ],
            },
        }
        return yaml.safe_dump(jobset, sort_keys=False)

    def pytorchjob(self) -> str:
        """A PyTorchJob (kubeflow.org/v1). Its operator tells torchrun all that `soma` tells it elsewhere, through the
        environment (PET_NNODES, PET_RDZV_ENDPOINT …), so the command has no options; the container's name is given."""
        pod = self.pod("pytorch", "", ["torchrun", "-m", "soma.cli", *self.arguments])
        del pod["restartPolicy"]  # the replica's decides
        job = {
            "apiVersion": "kubeflow.org/v1",
            "kind": "PyTorchJob",
            "metadata": self.metadata,
            "spec": {
                "nprocPerNode": str(self.ranks_per_node),
                "runPolicy": {"cleanPodPolicy": "None"},
                "elasticPolicy": {
                    "rdzvBackend": "c10d",
                    "rdzvPort": PORT,
                    "minReplicas": self.fewest,
                    "maxReplicas": self.nodes,
                    "maxRestarts": RESTARTS,
                },
                "pytorchReplicaSpecs": {
                    "Worker": {
                        "replicas": self.nodes,
                        "restartPolicy": "OnFailure",
                        "template": {"metadata": {"labels": self.labels}, "spec": pod},
                    }
                },
            },
        }
        return yaml.safe_dump(job, sort_keys=False)

    @property
    def object_name(self) -> str:
        """The run's name as Kubernetes takes it for all that is here, services being the strictest (RFC 1035): small
        letters, digits and hyphens, a letter first. `2nd.try_` is `run-2nd-try`."""
        plain = re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")
        return (plain if plain[0].isalpha() else f"run-{plain}")[:MOST].rstrip("-")

    @property
    def labels(self) -> dict[str, str]:
        return {"app.kubernetes.io/name": self.object_name}

    @property
    def metadata(self) -> dict[str, Any]:
        return {"name": self.object_name, "labels": self.labels}

    def job(self, pod: dict[str, Any], failures: int) -> dict[str, Any]:
        """The spec of an indexed Job, one pod a node, that may lose `failures` pods."""
        return {
            "completionMode": "Indexed",
            "completions": self.nodes,
            "parallelism": self.nodes,
            "backoffLimit": failures,
            "template": {"metadata": {"labels": self.labels}, "spec": pod},
        }

    def pod(self, container: str, first: str, command: list[str] | None = None) -> dict[str, Any]:
        """The spec of a node's pod; `first` is the name of the first one's, for the rendezvous."""
        main: dict[str, Any] = {
            "name": container,
            "image": self.image,
            "command": command or self.soma(f"{first}:{PORT}"),
            "env": [{"name": name, "value": value} for name, value in OWN_STORE.items()],
            "ports": [{"name": "pytorchjob-port" if container == "pytorch" else "rendezvous", "containerPort": PORT}],
            "volumeMounts": [{"name": "runs", "mountPath": self.runs}, {"name": "shm", "mountPath": "/dev/shm"}],
        }
        if self.gpus:
            main["resources"] = {"limits": {"nvidia.com/gpu": self.ranks_per_node}}
        return {
            "restartPolicy": "Never",
            "containers": [main],
            "volumes": [
                {"name": "runs", "persistentVolumeClaim": {"claimName": f"{self.object_name}-runs"}},
                {"name": "shm", "emptyDir": {"medium": "Memory"}},
            ],
        }
