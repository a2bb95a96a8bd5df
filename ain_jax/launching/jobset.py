"""The manifest of a Kubernetes JobSet: one pod a host, all started again together when one is lost."""

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence

from ain_jax.launching.machine import COORDINATOR
from ain_jax.plan import chips

MOUNT = "/runs"  # where the claim lies in each pod
PORT = 8476
GRACE_SECONDS = 600  # between SIGTERM and the end of a pod: the time that a save may take
FAULT = 1  # the exit status of a fault that is told, which the same command would end with again
CHIPS_PER_HOST = 4  # of every version here, where a slice has several hosts
GKE_NAMES = {"v5e": "tpu-v5-lite-podslice", "v5p": "tpu-v5p-slice", "v6e": "tpu-v6e-slice"}


@dataclasses.dataclass(frozen=True)
class Machines:
    """The hosts of one job, how many such jobs there are, and what each pod asks its host for."""

    hosts: int
    jobs: int
    resource: str
    count: int
    selector: Mapping[str, str]
    launcher: str

    @property
    def is_tpu(self) -> bool:
        return self.resource == "google.com/tpu"


def machines(tpu: str, gpus: int, nodes: int) -> Machines:
    """The machines of a TPU slice, or so many nodes with so many GPUs each."""
    if bool(tpu) == bool(gpus):
        raise ValueError("expected one of the two: --tpu v5p-128, or --gpus 8 with --nodes")
    if gpus:
        if gpus < 1 or nodes < 1:
            raise ValueError(f"--gpus {gpus} --nodes {nodes}: expected 1 or more each")
        return Machines(nodes, 1, "nvidia.com/gpu", gpus, {}, "launch/local.py")
    slices = chips.read(tpu)
    each = slices.chips // slices.count
    selector = {
        "cloud.google.com/gke-tpu-accelerator": GKE_NAMES[slices.chip.name],
        "cloud.google.com/gke-tpu-topology": "x".join(map(str, slices.shape)),
    }
    held = min(each, CHIPS_PER_HOST)
    return Machines(each // held, slices.count, "google.com/tpu", held, selector, "launch/tpu_pod.py")


def manifest(name: str, image: str, claim: str, command: Sequence[str], on: Machines, restarts: int) -> str:
    """The manifest as YAML.

    GKE itself tells a TPU host its place in the slice; a pod with GPUs is told by `machine.COORDINATOR`.
    """
    if not re.fullmatch(r"[a-z0-9]([-a-z0-9]{0,38}[a-z0-9])?", name):
        raise ValueError(f"--name {name!r}: expected at most 40 small letters, digits and -, as Kubernetes names pods")
    index = {"fieldRef": {"fieldPath": "metadata.annotations['batch.kubernetes.io/job-completion-index']"}}
    place = [f"{name}-workers-0-0.{name}:{PORT}", str(on.hosts)]
    told = [{"name": key, "value": value} for key, value in zip(COORDINATOR, place, strict=False)]
    container = {
        "name": "ain-jax",
        "image": image,
        "command": ["python", on.launcher, *command],
        "env": [] if on.is_tpu else [*told, {"name": COORDINATOR[2], "valueFrom": index}],
        "ports": [{"containerPort": PORT}],
        "resources": {"limits": {on.resource: on.count}},
        "volumeMounts": [{"name": "runs", "mountPath": MOUNT}, {"name": "shm", "mountPath": "/dev/shm"}],
    }
    pod = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": GRACE_SECONDS,
        "nodeSelector": dict(on.selector),
        "containers": [container],
        "volumes": [
            {"name": "runs", "persistentVolumeClaim": {"claimName": claim}},
            {"name": "shm", "emptyDir": {"medium": "Memory"}},
        ],
    }
    # A fault would come again at each start: only other ends, a lost node among them, restart the set.
    fault = {"containerName": "ain-jax", "operator": "In", "values": [FAULT]}
    job = {
        "parallelism": on.hosts,
        "completions": on.hosts,
        "completionMode": "Indexed",
        "backoffLimit": 0,
        "podFailurePolicy": {"rules": [{"action": "FailJob", "onExitCodes": fault}]},
        "template": {"spec": pod},
    }
    several = {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"} if on.is_tpu else {}
    rules = [{"name": "fault", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}]
    whole = {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {"name": name, "annotations": several},
        "spec": {
            "network": {"enableDNSHostnames": True},
            "failurePolicy": {"maxRestarts": restarts, "rules": rules},
            "replicatedJobs": [{"name": "workers", "replicas": on.jobs, "template": {"spec": job}}],
        },
    }
    return "".join(f"{line}\n" for line in _yaml(_filled(whole)))


def _filled(value: object) -> object:
    """Without what is empty."""
    if isinstance(value, Mapping):
        return {key: _filled(v) for key, v in value.items() if v not in ({}, [])}
    return [_filled(v) for v in value] if isinstance(value, list) else value


def _yaml(value: object, indent: str = "") -> list[str]:
    """The lines of a block of maps and lists; every leaf is JSON, which YAML reads as it is."""
    lines = []
    entries = value.items() if isinstance(value, Mapping) else ((None, v) for v in value)  # type: ignore[union-attr]
    for key, entry in entries:
        head = f"{indent}- " if key is None else f"{indent}{key}:"
        if not isinstance(entry, (Mapping, list)):
            lines.append(f"{head}{'' if key is None else ' '}{json.dumps(entry)}")
        elif key is None:
            first, *rest = _yaml(entry, indent + "  ")
            lines += [head + first.lstrip(), *rest]
        else:
            lines += [head, *_yaml(entry, indent + "  ")]
    return lines
