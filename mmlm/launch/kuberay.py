"""A command as a KubeRay RayJob: a head, workers, and one volume that all of them see.

`render` is pure: settings and a command give the YAML; `submit` hands that to kubectl. The objects are built from a
typed model of just those fields that we use (mmlm/launch/kubernetes.py), so that a misspelt key is an error here and
not a field that the API server drops.
"""

from __future__ import annotations

import shlex
import subprocess

import yaml
from pydantic import Field

from mmlm.config import Config
from mmlm.errors import LaunchError
from mmlm.launch import kubernetes as k8s


class KubeRayConfig(Config):
    """What is asked of Kubernetes (KubeRay 1.4 or newer). Where a job runs is never part of its identity."""

    image: str = "mmlm:cpu"
    """Container image, see infra/image."""
    namespace: k8s.Name | None = None
    ray: str = "2.60.0"
    """Version of Ray in the image."""
    workers: int = Field(2, ge=1)
    workers_max: int | None = Field(None, ge=1)
    """With a number above `workers`, Ray's autoscaler may add some."""
    cpus: int = Field(2, ge=1)
    """Cores of the head and of each worker."""
    memory: k8s.Quantity = "8Gi"
    """Of the head and of each worker."""
    gpus: int = Field(0, ge=0)
    """GPUs of each worker."""
    shared_memory: k8s.Quantity = "2Gi"
    """Size of /dev/shm, in which Ray keeps objects."""
    claim: k8s.Name = "mmlm-runs"
    """Name of the volume claim on which runs lie."""
    storage: k8s.Quantity | None = "20Gi"
    """Size of that volume where it is still to be made; null takes one that is there."""
    mount: str = "/runs"
    """Where the volume is seen; --out and --data lie below it."""
    retries: int = Field(2, ge=0)
    """How often the job starts again after a failure; it goes on from what is done."""
    ttl: int = Field(600, ge=0)
    """Seconds after the end until the cluster is removed."""
    service_account: str | None = None
    environment: dict[k8s.VariableName, str] = {}
    """Variables on all nodes."""
    secrets: dict[k8s.VariableName, str] = {}
    """Variables that come from a secret: NAME → secret/key."""


def render(config: KubeRayConfig, command: list[str], name: str, environment: dict[str, str] | None = None) -> str:
    """The YAML of a RayJob that runs `command` on the head of a cluster of its own. Same arguments, same text."""
    claims = [_claim(config, config.storage)] if config.storage else []
    plain = [document.plain() for document in (*claims, job(config, command, name, environment or {}))]
    return yaml.dump_all(plain, Dumper=_Dumper, sort_keys=False, width=120, allow_unicode=True)


def job(config: KubeRayConfig, command: list[str], name: str, environment: dict[str, str]) -> k8s.RayJob:
    autoscale = bool(config.workers_max and config.workers_max > config.workers)
    worker = k8s.WorkerGroup(
        group_name="workers",
        replicas=config.workers,
        min_replicas=config.workers,
        max_replicas=max(config.workers, config.workers_max or 0),
        template=_pod(config, environment, config.gpus),
    )
    return k8s.RayJob(
        metadata=k8s.Metadata(name=name, namespace=config.namespace),
        spec=k8s.RayJobSpec(
            entrypoint=shlex.join(command),
            shutdown_after_job_finishes=True,
            ttl_seconds_after_finished=config.ttl,
            backoff_limit=config.retries,
            ray_cluster_spec=k8s.RayCluster(
                ray_version=config.ray,
                enable_in_tree_autoscaling=True if autoscale else None,
                # the head only leads: a rank or an encoder there would starve the cluster's own processes
                head_group_spec=k8s.HeadGroup(
                    ray_start_params={"num-cpus": "0"}, template=_pod(config, environment, 0)
                ),
                worker_group_specs=[worker],
            ),
        ),
    )


def _pod(config: KubeRayConfig, environment: dict[str, str], gpus: int) -> k8s.PodTemplate:
    # the same mode on head, workers and clients: Ray makes a token otherwise, which a job does not send
    plain = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled", **environment, **config.environment}
    variables = [k8s.Variable(name=key, value=value) for key, value in sorted(plain.items())]
    for key, place in sorted(config.secrets.items()):
        secret, _, entry = place.partition("/")
        source = k8s.VariableSource(secret_key_ref=k8s.SecretKey(name=secret, key=entry or key))
        variables.append(k8s.Variable(name=key, value_from=source))
    graphics = {"nvidia.com/gpu": str(gpus)} if gpus else {}
    container = k8s.Container(
        name="ray",
        image=config.image,
        env=variables,
        resources=k8s.Resources(
            requests={"cpu": str(config.cpus), "memory": config.memory, **graphics},
            limits={"memory": config.memory, **graphics},
        ),
        volume_mounts=[
            k8s.Mount(name="runs", mount_path=config.mount),
            k8s.Mount(name="shm", mount_path="/dev/shm"),
        ],
    )
    return k8s.PodTemplate(
        spec=k8s.Pod(
            service_account_name=config.service_account,
            security_context=k8s.SecurityContext(run_as_user=1000, run_as_non_root=True, fs_group=1000),
            containers=[container],
            volumes=[
                k8s.Volume(name="runs", persistent_volume_claim=k8s.ClaimName(claim_name=config.claim)),
                k8s.Volume(name="shm", empty_dir=k8s.EmptyDir(medium="Memory", size_limit=config.shared_memory)),
            ],
        )
    )


def _claim(config: KubeRayConfig, storage: str) -> k8s.Claim:
    return k8s.Claim(
        metadata=k8s.Metadata(name=config.claim, namespace=config.namespace),
        spec=k8s.ClaimSpec(
            access_modes=["ReadWriteMany"],  # every node sees the same shards and checkpoints
            resources=k8s.Resources(requests={"storage": storage}),
        ),
    )


class _Dumper(yaml.SafeDumper):
    """Without anchors, which people cannot read, and lists set in below their key."""

    def ignore_aliases(self, data: object) -> bool:
        return True

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, False)


def submit(text: str) -> str:
    """Hand the YAML to `kubectl apply`; returns what it says. Raises LaunchError with its objection."""
    try:
        done = subprocess.run(["kubectl", "apply", "-f", "-"], input=text, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise LaunchError(
            "there is no `kubectl` here", cure="submit from a machine that has one, or see the YAML with --print"
        ) from None
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise LaunchError(f"Kubernetes refuses the job: {said[-1]}", cure="see --print")
    return done.stdout.strip()
