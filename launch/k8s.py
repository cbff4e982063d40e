"""A job as objects of Kubernetes.

The default is a JobSet: all pods start together, and all start again when one is lost, since the
others of a sharded run are of no use without it. Beside it stand the same run as an Indexed Job
(where a cluster has no custom resources), as Kubeflow's TrainJob, and jobs on Ray as RayJobs.

Exit codes decide: those that no further start mends end a job for good, a disruption starts it
again uncounted, all else starts it again and is counted. 75 has no rule of its own: it is what
survivors of a crash end with as well, and a crash must be counted. The pods of a run that was
stopped on purpose end with 0 (`launch.stopped`).
"""

from collections.abc import Sequence

from launch.job import NEVER_AGAIN, JobSpec
from launch.k8s_pods import config_map, labels, pod_spec, told_when_ended, train_command
from launch.k8s_rayjob import ray_jobs
from launch.k8s_text import Object, object_name, to_yaml, variables
from launch.site import KubernetesSite, Site
from pipeline.errors import UsageError

_RUNNING = ("JobSet", "TrainJob", "RayJob", "Job")
_PART = "node"
_QUEUE = "kueue.x-k8s.io/queue-name"
_PRIORITY = "kueue.x-k8s.io/priority-class"


def render(job: JobSpec, site: Site) -> str:
    """The YAML of a job, as `kubectl apply -f` takes it.

    Raises:
        UsageError: The site lacks something that pods need.
    """
    return to_yaml(objects(job, site))


def objects(job: JobSpec, site: Site) -> list[Object]:
    """The objects of a job, those that others refer to first."""
    name, kind = object_name(job.name), site.k8s.kind
    if job.kind != "train" or kind == "rayjob":
        made = ray_jobs(job, site, name)
    elif kind == "jobset":
        made = [config_map(job, name), job_set(job, site, name)]
    elif kind == "job":
        made = [config_map(job, name), _service(name), _indexed_job(job, site, name)]
    else:
        made = [config_map(job, name), *_train_job(job, site, name)]
    made += [_network_policy(one) for one in made if one["kind"] in _RUNNING]
    for one in made:
        metadata = one["metadata"]
        told = {**labels(metadata["name"]), **metadata.get("labels", {}), **_queued(one, site.k8s)}
        one["metadata"] = {**metadata, "namespace": site.k8s.namespace, "labels": told}
    return made


def main_objects(made: Sequence[Object]) -> list[Object]:
    """Those that run: what is watched and deleted; one, or of an array one for each value."""
    return [one for one in made if one["kind"] in _RUNNING]


def is_queued(one: Object) -> bool:
    """Whether Kueue suspends and admits it."""
    return _QUEUE in one["metadata"]["labels"]


def job_set(job: JobSpec, site: Site, name: str) -> Object:
    """One replicated Job, Indexed, restarted as a whole."""
    pod = _train_pod(job, site, name, first=f"{name}-{_PART}-0-0.{name}")
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {"name": name},
        "spec": {"ttlSecondsAfterFinished": site.k8s.keep_seconds, **_gang(job, site, name, pod)},
    }


def _gang(job: JobSpec, site: Site, name: str, pod: Object) -> Object:
    """What a JobSet and the template of a TrainingRuntime have in common."""
    template = {"spec": _job_spec(job, pod, backoff_limit=0, disrupted="FailJob")}
    return {
        "network": {
            "enableDNSHostnames": True,
            **({"subdomain": name} if site.k8s.kind == "jobset" else {}),
            "publishNotReadyAddresses": True,
        },
        "failurePolicy": {
            "maxRestarts": site.k8s.max_restarts,
            # All old pods gone before new ones come: no two writers.
            "restartStrategy": "BlockingRecreate",
            "rules": _rules(),
        },
        "replicatedJobs": [{"name": _PART, "replicas": 1, "template": template}],
    }


def _rules() -> list[Object]:
    """The first that matches counts; none: restart, counted. They read the controller's words."""
    codes = "|".join(str(int(code)) for code in NEVER_AGAIN)
    return [
        {
            "name": "neveragain",
            "action": "FailJobSet",
            "onJobFailureReasons": ["PodFailurePolicy"],
            "onJobFailureMessagePatterns": [f"exit code ({codes}) "],
        },
        {
            "name": "disrupted",
            "action": "RestartJobSetAndIgnoreMaxRestarts",
            "onJobFailureReasons": ["PodFailurePolicy"],
            "onJobFailureMessagePatterns": ["DisruptionTarget"],
        },
    ]


def _job_spec(job: JobSpec, pod: Object, *, backoff_limit: int, disrupted: str) -> Object:
    container = pod["spec"]["containers"][0]["name"]
    codes = {
        "containerName": container,
        "operator": "In",
        "values": [int(code) for code in NEVER_AGAIN],
    }
    return {
        "completionMode": "Indexed",
        "completions": job.nodes,
        "parallelism": job.nodes,
        "backoffLimit": backoff_limit,
        # A pod that still saves is not replaced by another that would write as well.
        "podReplacementPolicy": "Failed",
        "podFailurePolicy": {
            "rules": [
                {"action": "FailJob", "onExitCodes": codes},
                {
                    "action": disrupted,
                    # Up to Kubernetes 1.35 the status has to be said.
                    "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}],
                },
            ]
        },
        "template": pod,
    }


def _indexed_job(job: JobSpec, site: Site, name: str) -> Object:
    """Pods are replaced one by one: the others end by themselves when they miss one."""
    pod = _train_pod(job, site, name, first=f"{name}-0.{name}")
    pod["spec"]["subdomain"] = name
    limit = site.k8s.max_restarts * job.nodes
    spec = _job_spec(job, pod, backoff_limit=limit, disrupted="Ignore")
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": name},
        "spec": {"ttlSecondsAfterFinished": site.k8s.keep_seconds, **spec},
    }


def _service(name: str) -> Object:
    """Gives the pods of an Indexed Job their names."""
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name},
        "spec": {
            "clusterIP": "None",
            # Pods have to find each other before any of them is ready.
            "publishNotReadyAddresses": True,
            "selector": labels(name),
        },
    }


def _train_job(job: JobSpec, site: Site, name: str) -> list[Object]:
    """Kubeflow's controller tells a pod its place by PET_ variables, which our pods read too."""
    pod = _train_pod(job, site, name, first=None)
    runtime = {
        "apiVersion": "trainer.kubeflow.org/v1alpha1",
        "kind": "TrainingRuntime",
        "metadata": {"name": name},
        "spec": {
            "mlPolicy": {"numNodes": job.nodes, "torch": {}},
            "template": {"spec": _gang(job, site, name, pod)},
        },
    }
    (part,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    part["template"]["metadata"] = {
        "labels": {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}
    }
    # How many pods there are is the controller's to say, from numNodes.
    for count in ("completions", "parallelism"):
        del part["template"]["spec"][count]
    train = {
        "apiVersion": "trainer.kubeflow.org/v1alpha1",
        "kind": "TrainJob",
        "metadata": {"name": name},
        "spec": {
            "runtimeRef": {
                "apiGroup": "trainer.kubeflow.org",
                "kind": "TrainingRuntime",
                "name": name,
            },
            "trainer": {"numNodes": job.nodes, "numProcPerNode": job.ranks_per_node},
        },
    }
    return [runtime, train]


def _train_pod(job: JobSpec, site: Site, name: str, *, first: str | None) -> Object:
    """Metadata and spec of one machine; `first` is the name of the pod where the ranks meet."""
    # Kubeflow puts its variables into the container that is called as the part is.
    container = "train" if first else _PART
    spec = pod_spec(job, site, container=container, command=train_command(job, site))
    (main,) = spec["containers"]
    main["lifecycle"] = told_when_ended()
    if first:
        place = {
            "JEPA_NODES": str(job.nodes),
            "JEPA_RANKS_PER_NODE": str(job.ranks_per_node),
            "MASTER_ADDR": first,
            "MASTER_PORT": str(site.k8s.port),
        }
        _must_be_free(job, place)
        main["env"] = [*variables(place), *main["env"]]
    metadata: Object = {"labels": labels(name)}
    if site.k8s.topology:
        how = "required" if site.k8s.topology_required else "preferred"
        metadata["annotations"] = {f"kueue.x-k8s.io/podset-{how}-topology": site.k8s.topology}
    return {"metadata": metadata, "spec": spec}


def _must_be_free(job: JobSpec, place: dict[str, str]) -> None:
    taken = sorted(set(place) & set(job.environment))
    if taken:
        raise UsageError(
            f"the site file sets {', '.join(taken)}, which each job sets for itself",
            remedy="Remove it from environment in the site file; k8s.port says the port.",
        )


def _queued(one: Object, k8s: KubernetesSite) -> Object:
    """Kueue's labels belong on what it suspends and admits."""
    if one["kind"] not in _RUNNING or not k8s.queue:
        return {}
    return {_QUEUE: k8s.queue, **({_PRIORITY: k8s.priority} if k8s.priority else {})}


def _network_policy(one: Object) -> Object:
    """Ranks and Ray's processes run what reaches their ports, so only this job's pods may."""
    name, on_ray = one["metadata"]["name"], one["kind"] == "RayJob"
    own = {"from": [{"podSelector": {"matchLabels": labels(name)}}]}
    # KubeRay's operator submits the job by the head's dashboard, with the cluster's token.
    operator = {
        "from": [
            {
                "namespaceSelector": {},
                "podSelector": {"matchLabels": {"app.kubernetes.io/name": "kuberay-operator"}},
            }
        ],
        "ports": [{"port": 8265, "protocol": "TCP"}],
    }
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": name},
        "spec": {
            "podSelector": {"matchLabels": labels(name)},
            "policyTypes": ["Ingress"],
            "ingress": [own, *([operator] if on_ray else [])],
        },
    }
