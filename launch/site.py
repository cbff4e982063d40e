"""The site file: everything that is true of a cluster and of no single run, in one place.

Renderers take partitions, images, mounts, queues and network settings from here and from nowhere
else, so that a configuration runs on another cluster with another site file. Nothing in it is
secret: secrets are named here and kept by the scheduler.
"""

import re
from pathlib import Path
from typing import ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from launch.job import VARIABLE_NAME, Mount, parse_duration
from pipeline.config.load import load_config
from pipeline.config.section import Section
from pipeline.errors import UsageError

SITE_FILES = ("site.yaml", "slurm/site.yaml", "k8s/site.yaml")
"""Where a site file is looked for, from the current folder, if none is given."""
# A directive's word is cut at blanks, and `%` means something in the names of log files.
_WORD = r"^[A-Za-z0-9_][A-Za-z0-9_.,:=/@+*\[\]()|&-]*$"
# Names of Kubernetes: a DNS label, and a name that may have a domain before a slash.
_LABEL = r"^[a-z]([a-z0-9-]{0,61}[a-z0-9])?$"
_QUALIFIED = r"^([a-z0-9]([a-z0-9.-]*[a-z0-9])?/)?[A-Za-z0-9]([A-Za-z0-9_.-]*[A-Za-z0-9])?$"


class MountPoint(Section):
    """A folder of the machines that containers see."""

    source: str = Field(pattern=r"^/[^\x00:,]*$")
    """Absolute path on the machines."""
    target: str | None = Field(default=None, pattern=r"^/[^\x00:,]*$")
    """Absolute path in the container; the same one by default."""
    read_only: bool = False
    """Whether the container may not write there."""

    @property
    def mount(self) -> Mount:
        """As a job knows it."""
        return Mount(
            source=self.source, target=self.target or self.source, read_only=self.read_only
        )


class SlurmSite(Section):
    """What Slurm asks for here."""

    partition: str | None = Field(default=None, pattern=_WORD)
    """Partition to queue in; the cluster's own default if null."""
    account: str | None = Field(default=None, pattern=_WORD)
    """Account that pays."""
    qos: str | None = Field(default=None, pattern=_WORD)
    """Quality of service."""
    constraint: str | None = Field(default=None, pattern=_WORD)
    """Features that nodes must have, such as h100."""
    reservation: str | None = Field(default=None, pattern=_WORD)
    """Reservation to run in."""
    exclude: str | None = Field(default=None, pattern=_WORD)
    """Nodes never to be used, as gpu[017,020]."""
    exclusive: bool = True
    """Whether a training job has its nodes for itself."""
    gpu_request: Literal["gpus-per-node", "gres", "none"] = "gpus-per-node"
    """How GPUs are asked for: --gpus-per-node=N, --gres=gpu:N, or not at all, where Slurm does not
    manage them."""
    gpu_type: str | None = Field(default=None, pattern=r"^[A-Za-z0-9_.-]+$")
    """Kind of GPU in that request, such as h100."""
    launcher: Literal["srun", "torchrun"] = "srun"
    """`srun` starts one task for each rank; `torchrun` one agent a node, which starts the ranks."""
    container: Literal["none", "pyxis", "apptainer"] = "none"
    """What runs the image: the pyxis plug-in of srun (enroot), or apptainer."""
    setup: tuple[str, ...] = ()
    """Shell lines that every job begins with, such as `module load cuda/12.8`; run as they are."""
    extra: tuple[str, ...] = ()
    """Further options of sbatch, such as --comment=jepa."""
    max_failures: int = Field(default=3, ge=1)
    """Failures in a row without a new checkpoint after which a job gives up."""
    preflight_seconds: int = Field(default=120, ge=5)
    """Limit of the checks before training."""

    @field_validator("extra")
    @classmethod
    def _extra_are_options(cls, extra: tuple[str, ...]) -> tuple[str, ...]:
        for option in extra:
            if not option.startswith("-") or any(sign in option for sign in " \t\r\n\"'\\#"):
                raise ValueError(f"expected an option such as --comment=jepa, got {option!r}")
        return extra


class Claim(Section):
    """A PersistentVolumeClaim that pods see."""

    name: str = Field(pattern=_LABEL)
    """Name of the claim, which somebody made in the namespace."""
    target: str = Field(pattern=r"^/[^\x00:,]*$")
    """Absolute path in the pod."""
    read_only: bool = False
    """Whether pods may not write there."""


class KubernetesSite(Section):
    """What Kubernetes asks for here."""

    namespace: str = Field(default="jepa", pattern=_LABEL)
    """Namespace of everything that is rendered."""
    kind: Literal["jobset", "job", "trainjob", "rayjob"] = "jobset"
    """Object that trains: a JobSet, an Indexed Job with a headless Service where there are no
    custom resources, Kubeflow's TrainJob, or Ray Train in a RayJob."""
    queue: str | None = Field(default=None, pattern=_LABEL)
    """Kueue's LocalQueue; null leaves Kueue out, and nobody admits all pods or none."""
    priority: str | None = Field(default=None, pattern=_LABEL)
    """Kueue's WorkloadPriorityClass."""
    topology: str | None = Field(default=None, pattern=_QUALIFIED)
    """Level of topology that pods should share, such as cloud.provider.com/topology-rack."""
    topology_required: bool = False
    """Whether they must share it, or else wait."""
    gpu_resource: str = Field(default="nvidia.com/gpu", pattern=_QUALIFIED)
    """What the device plug-in calls a GPU."""
    resources: dict[str, str] = Field(default_factory=dict)
    """Further resources of each pod, such as rdma/hca: "8"."""
    claims: tuple[Claim, ...] = Field(default=(), strict=False)
    """Volumes for data and runs; the runs' folder must be one that all pods can write to."""
    work_dir: str = Field(default="/data", pattern=r"^/[^\x00:,]*$")
    """Current folder of the pods, where relative paths of a configuration begin."""
    shm_gib: int = Field(default=64, ge=1)
    """Size of /dev/shm, which is memory of the pod: loader workers and NCCL use it."""
    scratch_gib: int = Field(default=200, ge=1)
    """Size of the node's own disk that a pod may fill."""
    secrets: tuple[str, ...] = ()
    """Secrets whose keys become variables, such as AWS_ACCESS_KEY_ID; named here, kept there."""
    pull_secret: str | None = Field(default=None, pattern=_LABEL)
    """Secret that the image is pulled with."""
    user_id: int = Field(default=10001, ge=1)
    """User and group that everything runs as; the one of the Dockerfile."""
    node_selector: dict[str, str] = Field(default_factory=dict)
    """Labels that nodes must have, where Kueue's flavors do not say so."""
    tolerated: tuple[str, ...] = ()
    """Keys of the nodes' taints that pods accept, where Kueue's flavors do not say so."""
    port: int = Field(default=29500, ge=1024, le=65000)
    """Port of the first pod where the ranks meet; pods have addresses of their own."""
    wait_seconds: int = Field(default=600, ge=1)
    """How long a pod waits for the name of the first one."""
    check_seconds: int = Field(default=300, ge=5)
    """Limit of the checks before training; images do not reach all nodes at the same time."""
    max_restarts: int = Field(default=20, ge=0)
    """Restarts of all pods that are counted; disruptions are not."""
    keep_seconds: int = Field(default=604800, ge=0)
    """How long an ended job, and its pods' logs, stay."""


class RaySite(Section):
    """How Ray is run for work beside training."""

    cluster_wait_seconds: int = Field(default=120, ge=1)
    """How long the first node waits for the others to join."""


class Site(Section):
    """A cluster."""

    keys_are_in: ClassVar[str] = "slurm/site-*.yaml and k8s/site-*.yaml show what a site file says"
    has_shipped_files: ClassVar[bool] = False

    name: str = "cluster"
    """What messages call it."""
    python: str = "python"
    """Interpreter with jepa installed, as the nodes or the image see it: absolute, or found on the
    PATH that `setup` leaves."""
    image: str | None = None
    """Container image; null runs on the machines as they are."""
    mounts: tuple[MountPoint, ...] = Field(default=(), strict=False)
    """Folders that containers see: data, runs, and the folder that jobs are submitted from."""
    scratch: str = Field(default="/tmp", pattern=r"^/[^\x00]*$")  # noqa: S108 - a node's own disk
    """Folder of a node's own disk; every job makes one of its own below it."""
    environment: dict[str, str] = Field(default_factory=dict)
    """Variables of every process, such as NCCL_SOCKET_IFNAME."""
    nodes: int = Field(default=1, ge=1)
    """Nodes of a job unless --nodes says otherwise."""
    gpus_per_node: int = Field(default=8, ge=0)
    """GPUs of a node; 0 trains on processors."""
    ranks_per_node: int | None = Field(default=None, ge=1)
    """Processes of a node; null means one for each GPU."""
    cpus_per_rank: int = Field(default=8, ge=1)
    """Cores for each rank, shared with its loader workers."""
    memory_gib: int | None = Field(default=None, ge=1)
    """Memory to ask for on each node; null takes what the scheduler gives."""
    time: str = "24:00:00"
    """Time limit of a job, as Slurm writes it; a job that reaches it saves and queues again."""
    grace_seconds: int = Field(default=300, ge=1)
    """Seconds before the end of its time at which a job is asked to save: one step, the longest
    save and 60 s."""
    preflight: bool = True
    """Whether every start begins with the checks of `jepa check`."""
    slurm: SlurmSite = SlurmSite()
    """What Slurm asks for."""
    k8s: KubernetesSite = KubernetesSite()
    """What Kubernetes asks for."""
    ray: RaySite = RaySite()
    """How Ray is run."""

    @field_validator("time")
    @classmethod
    def _time_is_one(cls, time: str) -> str:
        try:
            parse_duration(time)
        except UsageError as error:
            raise ValueError(str(error)) from None
        return time

    @field_validator("environment")
    @classmethod
    def _names_are_names(cls, environment: dict[str, str]) -> dict[str, str]:
        for name in environment:
            if re.fullmatch(VARIABLE_NAME, name) is None:
                raise ValueError(f"expected the name of a variable, got {name!r}")
        return environment

    @model_validator(mode="after")
    def _ranks_have_gpus(self) -> Self:
        if self.gpus_per_node and self.ranks_per_node not in (None, self.gpus_per_node):
            raise ValueError(
                f"ranks_per_node {self.ranks_per_node} is not gpus_per_node {self.gpus_per_node}: "
                "every rank has one GPU"
            )
        return self


def find_site(path: Path | None, overrides: tuple[str, ...] = ()) -> Site:
    """The site file that was given, or the one that lies in its usual place.

    Args:
        path: The file, or None for those of SITE_FILES below the current folder.
        overrides: `key=value` laid over it, as --set gives them.

    Raises:
        UsageError: There is none.
        ConfigError: It is wrong; all mistakes are told.
    """
    found = path or next((p for p in map(Path, SITE_FILES) if p.is_file()), None)
    if found is None:
        raise UsageError(
            f"there is no site file: {', '.join(SITE_FILES)} do not exist here",
            remedy="Copy the nearest of slurm/site-*.yaml or k8s/site-*.yaml to site.yaml and fill "
            "in your cluster, or give one with --site FILE.",
        )
    return load_config(found, Site, overrides).config
