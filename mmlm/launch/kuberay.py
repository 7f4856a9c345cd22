"""A command as a KubeRay RayJob: a head, workers, and one volume that all of them see.

`render` is pure: settings, a command and a title give the YAML; `submit` hands that to kubectl. The objects are built from a
typed model of just those fields that we use (mmlm/launch/kubernetes.py), so that a misspelt key is an error here and
not a field that the API server drops.
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
import subprocess
from dataclasses import dataclass

import yaml
from pydantic import Field, ValidationInfo, field_validator

from mmlm.config import Config
from mmlm.errors import LaunchError
from mmlm.launch import kubernetes as k8s
from mmlm.launch.ray_train import MOST, STOP_WAIT
from mmlm.world import quiet_environment

OUT = "mmlm/out"
"""Label of a job: the folder that it writes, which only one may at a time."""
_PLAIN = re.compile(r"[A-Za-z0-9_@%+=:,./-]+")
"""What no shell changes."""
ENDED = ("Complete", "Failed", "ValidationFailed")
"""What the status of a RayJob says when nothing of it runs any more."""


class KubeRayConfig(Config):
    """What is asked of Kubernetes (KubeRay 1.4 or newer). Where a job runs is never part of its identity."""

    image: str | None = None
    """Container image, see infra/image; default: mmlm:cuda where `gpus` are asked for, else mmlm:cpu."""
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
    grace: int = Field(300, ge=10)
    """Seconds that the ranks have to finish their step and save when the job is stopped or deleted."""
    ttl: int = Field(600, ge=0)
    """Seconds after the end until the cluster is removed."""
    service_account: str | None = None
    environment: dict[k8s.VariableName, str] = {}
    """Variables on all nodes."""
    secrets: dict[k8s.VariableName, str] = {}
    """Variables that come from a secret: NAME → secret/key."""

    @field_validator("workers_max")
    @classmethod
    def _not_below(cls, most: int | None, info: ValidationInfo) -> int | None:
        workers = info.data.get("workers")
        if most is not None and workers is not None and most < workers:
            raise ValueError(f"the cluster begins with workers = {workers} and only grows; give at least that, or none")
        return most


@dataclass(frozen=True)
class Title:
    """What a job is called in Kubernetes."""

    name: str
    labels: dict[str, str]


def title(config: KubeRayConfig, verb: str, story: str, out: str) -> Title:
    """A name that no other submission has: a RayJob that has ended stays, and applying it again would do nothing."""
    labels = {"mmlm/verb": verb, "mmlm/story": _slug(story, 63), OUT: _slug(f"{config.claim}:{out}", 63)}
    return Title(f"{_slug(f'mmlm-{verb}-{story}', 40)}-{secrets.token_hex(3)}", labels)


def _slug(text: str, longest: int) -> str:
    """`text` as a DNS label; where that changed more than capitals, a part of its hash keeps it apart from others."""
    plain = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
    if plain == text.lower() and len(plain) <= longest:
        return plain
    return f"{plain[: longest - 7].strip('-') or 'x'}-{hashlib.sha256(text.encode()).hexdigest()[:6]}"


def render(config: KubeRayConfig, command: list[str], title: Title, environment: dict[str, str] | None = None) -> str:
    """The YAML of a RayJob that runs `command` on the head of a cluster of its own. Same arguments, same text."""
    claims = [_claim(config, config.storage)] if config.storage else []
    plain = [document.plain() for document in (*claims, job(config, command, title, environment or {}))]
    return yaml.dump_all(plain, Dumper=_Dumper, sort_keys=False, width=120, allow_unicode=True)


def entrypoint(command: list[str]) -> str:
    """`command` so that its words arrive as they are.

    KubeRay puts the text into bash, which calls `ray job submit`, which joins the words again with the quotes of Windows
    (`list2cmdline`: only double ones, only around spaces), and runs that with sh. So where a word holds anything
    special, a bash of our own gets the command, in which such words are written in escapes.
    """
    if all(map(_PLAIN.fullmatch, command)):
        return " ".join(command)
    words = " ".join(word if _PLAIN.fullmatch(word) else _escaped(word) for word in command)
    dollar = r"\\\$"  # for bash, and then for sh
    return f'bash -c "exec {words.replace("$", dollar)}"'


def _escaped(word: str) -> str:
    return "$'" + "".join(chr(b) if _PLAIN.fullmatch(chr(b)) else f"\\x{b:02x}" for b in word.encode()) + "'"


def job(config: KubeRayConfig, command: list[str], title: Title, environment: dict[str, str]) -> k8s.RayJob:
    autoscale = bool(config.workers_max and config.workers_max > config.workers)
    if autoscale:  # ranks may be more than fit what is up when the job begins
        each = {"CPU": config.cpus, "GPU": config.gpus}
        environment = {MOST[kind]: str((config.workers_max or 0) * count) for kind, count in each.items()} | environment
    worker = k8s.WorkerGroup(
        group_name="workers",
        replicas=config.workers,
        min_replicas=config.workers,
        max_replicas=max(config.workers, config.workers_max or 0),
        template=_pod(config, environment, config.gpus),
    )
    return k8s.RayJob(
        metadata=k8s.Metadata(name=title.name, namespace=config.namespace, labels=title.labels),
        spec=k8s.RayJobSpec(
            entrypoint=entrypoint(command),
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
    ours = {
        **quiet_environment(),
        "PYTHONUNBUFFERED": "1",
        # the same mode on head, workers and clients: Ray makes a token otherwise, which a job does not send
        "RAY_AUTH_MODE": "disabled",
        # what a stopped job gets to save, and for so long the nodes of a deleted one wait for it
        STOP_WAIT: str(config.grace),
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": str(config.grace),
    }
    plain = {**ours, **environment, **config.environment}
    variables = [k8s.Variable(name=key, value=value) for key, value in sorted(plain.items())]
    for key, place in sorted(config.secrets.items()):
        secret, _, entry = place.partition("/")
        source = k8s.VariableSource(secret_key_ref=k8s.SecretKey(name=secret, key=entry or key))
        variables.append(k8s.Variable(name=key, value_from=source))
    graphics = {"nvidia.com/gpu": str(gpus)} if gpus else {}
    container = k8s.Container(
        name="ray",
        image=config.image or ("mmlm:cuda" if config.gpus else "mmlm:cpu"),
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
            termination_grace_period_seconds=config.grace + 30,
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


def submit(text: str, title: Title, namespace: str | None = None) -> str:
    """Hand the YAML to `kubectl apply`; returns what it says.

    Raises LaunchError with its objection, or when a job that writes the same folder has not ended.
    """
    going = unfinished(title, namespace)
    if going:
        raise LaunchError(
            f"the job {going[0]} is still at work on this folder",
            wanted="one job at a time for an --out",
            cure=f"wait for it (`kubectl logs -f job/{going[0]}`), end it (`kubectl delete rayjob {going[0]}`), or give "
            "another --out",
        )
    done = _kubectl("apply", "-f", "-", stdin=text)
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise LaunchError(f"Kubernetes refuses the job: {said[-1]}", cure="see --print")
    return done.stdout.strip()


def unfinished(title: Title, namespace: str | None) -> list[str]:
    """Names of the jobs that write the same folder and have not ended; none where kubectl may not tell."""
    where = ["-n", namespace] if namespace else []
    done = _kubectl("get", "rayjobs.ray.io", *where, "-l", f"{OUT}={title.labels[OUT]}", "-o", "json")
    try:
        found = json.loads(done.stdout)["items"] if done.returncode == 0 else []
    except (ValueError, KeyError, TypeError):
        found = []
    status = {item["metadata"]["name"]: item.get("status", {}).get("jobDeploymentStatus") for item in found}
    return sorted(name for name, state in status.items() if state not in ENDED)


def _kubectl(*words: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(["kubectl", *words], input=stdin, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise LaunchError(
            "there is no `kubectl` here", cure="submit from a machine that has one, or see the YAML with --print"
        ) from None
