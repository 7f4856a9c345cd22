"""The fields of Kubernetes and KubeRay objects that we write, typed; any other key is refused.

Names are those of the API in snake case (`group_name` is written `groupName`). Checked by hand against the CRD that
KubeRay 1.7 publishes (ray.io_rayjobs.yaml), which cuts out unknown keys without a word.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator
from pydantic.alias_generators import to_camel

Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", max_length=47)]
"""A DNS label; KubeRay takes names of at most 47 characters."""
VariableName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z_]\w*$")]
Quantity = Annotated[str, StringConstraints(pattern=r"^\d+(\.\d+)?(m|k|Ki|M|Mi|G|Gi|T|Ti)?$")]


class Object(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", alias_generator=to_camel, populate_by_name=True)

    def plain(self) -> dict[str, Any]:
        """As the API spells it, without what is not set."""
        return self.model_dump(mode="json", by_alias=True, exclude_none=True)


Label = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?$", max_length=63)]


class Metadata(Object):
    name: Name
    namespace: Name | None = None
    labels: dict[str, Label] | None = None


class SecretKey(Object):
    name: str
    key: str


class VariableSource(Object):
    secret_key_ref: SecretKey


class Variable(Object):
    name: VariableName
    value: str | None = None
    value_from: VariableSource | None = None


class Resources(Object):
    requests: dict[str, Quantity]
    limits: dict[str, Quantity] | None = None


class Mount(Object):
    name: Name
    mount_path: str


class Container(Object):
    name: Name
    image: str
    env: list[Variable]
    resources: Resources
    volume_mounts: list[Mount]


class ClaimName(Object):
    claim_name: Name


class EmptyDir(Object):
    medium: Literal["Memory"]
    size_limit: Quantity


class Volume(Object):
    name: Name
    persistent_volume_claim: ClaimName | None = None
    empty_dir: EmptyDir | None = None


class SecurityContext(Object):
    run_as_user: int
    run_as_non_root: bool
    fs_group: int


class Pod(Object):
    termination_grace_period_seconds: int
    service_account_name: str | None = None
    security_context: SecurityContext
    containers: list[Container]
    volumes: list[Volume]

    @model_validator(mode="after")
    def _mounts_have_volumes(self) -> Pod:
        known = {volume.name for volume in self.volumes}
        for container in self.containers:
            for mount in container.volume_mounts:
                if mount.name not in known:
                    raise ValueError(f"{container.name} mounts {mount.name}, which is no volume of the pod")
        return self


class PodTemplate(Object):
    spec: Pod


class HeadGroup(Object):
    ray_start_params: dict[str, str] = {}
    template: PodTemplate


class WorkerGroup(Object):
    group_name: Name
    replicas: int = Field(ge=0)
    min_replicas: int = Field(ge=0)
    max_replicas: int = Field(ge=1)
    ray_start_params: dict[str, str] = {}
    template: PodTemplate

    @model_validator(mode="after")
    def _in_order(self) -> WorkerGroup:
        if not self.min_replicas <= self.replicas <= self.max_replicas:
            raise ValueError(f"{self.min_replicas} ≤ {self.replicas} ≤ {self.max_replicas} does not hold")
        return self


class RayCluster(Object):
    ray_version: str
    enable_in_tree_autoscaling: bool | None = None
    head_group_spec: HeadGroup
    worker_group_specs: list[WorkerGroup]


class RayJobSpec(Object):
    entrypoint: str
    submission_mode: Literal["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"] = "K8sJobMode"
    shutdown_after_job_finishes: bool
    ttl_seconds_after_finished: int
    backoff_limit: int
    ray_cluster_spec: RayCluster


class RayJob(Object):
    api_version: Literal["ray.io/v1"] = "ray.io/v1"
    kind: Literal["RayJob"] = "RayJob"
    metadata: Metadata
    spec: RayJobSpec


class ClaimSpec(Object):
    access_modes: list[Literal["ReadWriteMany", "ReadWriteOnce"]]
    resources: Resources


class Claim(Object):
    api_version: Literal["v1"] = "v1"
    kind: Literal["PersistentVolumeClaim"] = "PersistentVolumeClaim"
    metadata: Metadata
    spec: ClaimSpec
