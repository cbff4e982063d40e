"""The pod of a job: one machine with its ranks, in the restricted security profile.

Every object that runs something, whatever its kind, has this pod in it, so that none of them can
be laxer than the others: no root, no further rights, no writable image, no token of the cluster.
"""

import json
from pathlib import Path

from launch.job import JobSpec
from launch.k8s_text import Object, kept, object_name, variables
from launch.site import Site
from pipeline.errors import UsageError

CONFIG_DIR = "/etc/jepa"
# Left when the cluster ends a pod, not when its process ends by itself: `kubectl describe pod`
# shows it where otherwise the last lines of the log stand.
_WHEN_ENDED = "the cluster ends this pod: deleted, paused, preempted, evicted or drained"
CONFIG_KEY = "run.yaml"
SCRATCH = "/scratch"
_CONFIG_BYTES = 900_000
# What the ranks need beside /dev/shm, in GiB: interpreter, libraries and the copy of a save.
_LEAST_BESIDE_SHM = 2
# Ray keeps its sockets and logs in /tmp.
_TMP_GIB, _LOGS_GIB = 10, 1


def train_command(job: JobSpec, site: Site) -> list[str]:
    """Words of a training pod, in exec form: a shell as first process would keep signals back."""
    k8s = site.k8s
    gpus = ["--gpus", str(job.gpus_per_node)] if job.gpus_per_node else []
    words = [site.python, "-m", "launch.k8s_pod", "--wait", str(k8s.wait_seconds)]
    words += ["--check", str(k8s.check_seconds), *gpus] if site.preflight else []
    return [*words, "--run", _run_folder(job), *words_inside(job)]


def words_inside(job: JobSpec) -> list[str]:
    """The job's words, with the configuration where pods see it."""
    here = f"{CONFIG_DIR}/{CONFIG_KEY}"
    return [here if word == str(job.config_path) else word for word in job.argv]


def pod_spec(job: JobSpec, site: Site, *, container: str, command: list[str]) -> Object:
    """The pod of a training job, of preparation and of probes.

    Raises:
        UsageError: The site says no image, no memory, or less memory than shared memory.
    """
    k8s = site.k8s
    spec: Object = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": job.grace_seconds,
        "enableServiceLinks": False,
        "automountServiceAccountToken": False,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": k8s.user_id,
            "runAsGroup": k8s.user_id,
            "fsGroup": k8s.user_id,
            # Without it the owner of every file of a large volume is looked at before each start.
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [_container(job, site, container, command)],
        "volumes": _volumes(job, site),
    }
    if k8s.pull_secret:
        spec["imagePullSecrets"] = [{"name": k8s.pull_secret}]
    if k8s.node_selector:
        spec["nodeSelector"] = dict(k8s.node_selector)
    if k8s.tolerated:
        spec["tolerations"] = [{"key": key, "operator": "Exists"} for key in k8s.tolerated]
    return spec


def told_when_ended() -> Object:
    """A hook that leaves a word on who ended the pod; the run hears of it by SIGTERM."""
    command = ["sh", "-c", f"echo '{_WHEN_ENDED}' >/dev/termination-log"]
    return {"preStop": {"exec": {"command": command}}}


def restricted() -> Object:
    """Security context of a container."""
    return {
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
        "readOnlyRootFilesystem": True,
    }


def config_map(job: JobSpec, name: str, words: list[str] | None = None) -> Object:
    """What the pods of job `name` read: the frozen configuration, or the words of a job on Ray.

    Raises:
        UsageError: It is larger than an object may be.
    """
    data = {} if job.config_text is None else {CONFIG_KEY: job.config_text}
    if words is not None:
        data["words.json"] = json.dumps(words, indent=1) + "\n"
    if sum(len(text.encode("utf-8", "replace")) for text in data.values()) > _CONFIG_BYTES:
        raise UsageError(
            "the configuration is too large for a ConfigMap, which holds 1 MiB",
            remedy="Put long lists into files on a claim and name those.",
        )
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": config_name(name), "labels": labels(name)},
        "data": data,
    }


def labels(name: str) -> Object:
    """What all objects and pods of a job have in common, and select each other by."""
    return {"app.kubernetes.io/name": "jepa", "app.kubernetes.io/instance": name}


def config_name(name: str) -> str:
    """Name of a job's ConfigMap."""
    return f"{name}-config"


def _container(job: JobSpec, site: Site, name: str, command: list[str]) -> Object:
    if job.image is None:
        raise UsageError(
            "expected the image that pods run, got none",
            remedy="Set image in the site file; k8s/Dockerfile builds one.",
        )
    k8s = site.k8s
    return {
        "name": name,
        "image": job.image,
        "imagePullPolicy": "IfNotPresent",
        "workingDir": k8s.work_dir,
        "command": [kept(word) for word in command],
        "env": _environment(job),
        "terminationMessagePolicy": "FallbackToLogsOnError",
        **({"envFrom": [{"secretRef": {"name": s}} for s in k8s.secrets]} if k8s.secrets else {}),
        "resources": _resources(job, site),
        "securityContext": restricted(),
        "volumeMounts": [
            {"name": "shm", "mountPath": "/dev/shm"},  # noqa: S108 - the pod's own
            {"name": "scratch", "mountPath": SCRATCH},
            {"name": "tmp", "mountPath": "/tmp"},  # noqa: S108 - the pod's own
            {"name": "config", "mountPath": CONFIG_DIR, "readOnly": True},
            *(
                {"name": f"claim-{number}", "mountPath": claim.target}
                | ({"readOnly": True} if claim.read_only else {})
                for number, claim in enumerate(k8s.claims)
            ),
        ],
    }


def _environment(job: JobSpec) -> list[Object]:
    values = {
        "NCCL_DEBUG": "WARN",
        "PYTHONUNBUFFERED": "1",
        # The image is read-only, and compiled operators left by a killed job must not outlive it.
        "HOME": SCRATCH,
        "TORCH_EXTENSIONS_DIR": f"{SCRATCH}/torch_extensions",
        **job.environment,
    }
    node = {"name": "JEPA_NODE_NAME", "valueFrom": {"fieldRef": {"fieldPath": "spec.nodeName"}}}
    return [*variables(values), node]


def _resources(job: JobSpec, site: Site) -> Object:
    k8s = site.k8s
    if job.memory_gib is None or job.memory_gib < k8s.shm_gib + _LEAST_BESIDE_SHM:
        raise UsageError(
            f"expected memory_gib of at least shm_gib {k8s.shm_gib} + {_LEAST_BESIDE_SHM}, since "
            f"shared memory counts to the pod's, got {job.memory_gib}",
            remedy="Set memory_gib, or k8s.shm_gib, in the site file.",
        )
    memory = f"{job.memory_gib}Gi"
    extended = dict(k8s.resources)
    if job.gpus_per_node:
        extended[k8s.gpu_resource] = str(job.gpus_per_node)
    disk = f"{k8s.scratch_gib + _TMP_GIB + _LOGS_GIB}Gi"
    cpus = str(job.cpus_per_rank * job.ranks_per_node)
    return {
        # Without a limit on processors: throttled loader workers make every rank wait.
        "requests": {"cpu": cpus, "memory": memory, "ephemeral-storage": disk},
        "limits": {"memory": memory, "ephemeral-storage": disk, **extended},
    }


def _volumes(job: JobSpec, site: Site) -> list[Object]:
    k8s = site.k8s
    claims = [
        {
            "name": f"claim-{number}",
            "persistentVolumeClaim": {"claimName": claim.name}
            | ({"readOnly": True} if claim.read_only else {}),
        }
        for number, claim in enumerate(k8s.claims)
    ]
    config = config_name(object_name(job.name))
    return [
        {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": f"{k8s.shm_gib}Gi"}},
        {"name": "scratch", "emptyDir": {"sizeLimit": f"{k8s.scratch_gib}Gi"}},
        {"name": "tmp", "emptyDir": {"sizeLimit": f"{_TMP_GIB}Gi"}},
        {"name": "config", "configMap": {"name": config}},
        *claims,
    ]


def _run_folder(job: JobSpec) -> str:
    """The run's folder as pods see it: from their own current folder, unless it is absolute."""
    folder = job.run_dir or Path("run")
    return str(folder.relative_to(job.work_dir) if folder.is_relative_to(job.work_dir) else folder)
