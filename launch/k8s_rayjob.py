"""Jobs on Ray as RayJobs: preparation, probes, the conductor, and Ray Train where it is wanted.

The head is the first machine and works like the others, so that a job on N nodes takes N nodes. The
words of the job lie in a file, and the entry point, which KubeRay hands to a shell, is the same in
every job. Ray asks for a token (`authOptions`); KubeRay makes it and hands it to the pods.
"""

from dataclasses import replace
from importlib import metadata

from launch.job import EACH, JobSpec
from launch.k8s_pods import CONFIG_DIR, config_map, labels, pod_spec, restricted, words_inside
from launch.k8s_text import Object, object_name
from launch.site import Site

_RETRIES = 3


def ray_jobs(job: JobSpec, site: Site, name: str) -> list[Object]:
    """ConfigMap and RayJob; of an array one of each for every value."""
    if not job.is_array:
        return _one(job, site, name)
    made = list[Object]()
    for number, value in enumerate(job.each):
        argv = tuple(word.replace(EACH, value) for word in job.argv)
        one = replace(job, name=f"{job.name}-{number}", argv=argv, each=())
        made += _one(one, site, object_name(one.name))
    return made


def _one(job: JobSpec, site: Site, name: str) -> list[Object]:
    words = words_inside(job)
    if _joins_ray(words) and "--address" not in words:
        words += ["--address", "auto"]
    if job.kind == "train":
        ranks = job.nodes * job.ranks_per_node
        gpus = [] if job.gpus_per_node else ["--cpus-only"]
        overrides = [word for word in words[1:] if not word.startswith("-")]
        flags = ["--ranks", str(ranks), "--address", "auto", *gpus, "--stopped-is-done"]
        words = ["launch", "ray", *overrides, *flags]
    return [config_map(job, name, words), _ray_job(job, site, name)]


def _joins_ray(words: list[str]) -> bool:
    """Whether the verb can use the cluster that it runs in."""
    return words[:1] == ["conduct"] or words[:2] == ["prep", "run"]


def _ray_job(job: JobSpec, site: Site, name: str) -> Object:
    cluster: Object = {
        "rayVersion": metadata.version("ray"),
        "authOptions": {"mode": "token"},
        "headGroupSpec": {
            "rayStartParams": _start(job),
            "template": _pod(job, site, name, "ray-head"),
        },
    }
    if job.nodes > 1:
        workers = job.nodes - 1
        cluster["workerGroupSpecs"] = [
            {
                "groupName": "workers",
                "replicas": workers,
                "minReplicas": workers,
                "maxReplicas": workers,
                "rayStartParams": _start(job),
                "template": _pod(job, site, name, "ray-worker"),
            }
        ]
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": {"name": name},
        "spec": {
            "entrypoint": f"{site.python} -m launch.k8s_entry {CONFIG_DIR}/words.json",
            "submissionMode": "K8sJobMode",
            "submitterPodTemplate": {
                "metadata": {"labels": labels(name)},
                "spec": _submitter(job, site),
            },
            "shutdownAfterJobFinishes": True,
            "ttlSecondsAfterFinished": min(3600, site.k8s.keep_seconds),
            "activeDeadlineSeconds": job.time_limit_seconds,
            # A new cluster each time; what was done is not done again.
            "backoffLimit": _RETRIES,
            "rayClusterSpec": cluster,
        },
    }


def _start(job: JobSpec) -> Object:
    """Ray counts a host's processors, not those that a pod asked for."""
    return {"num-cpus": str(job.cpus_per_rank * job.ranks_per_node)}


def _pod(job: JobSpec, site: Site, name: str, container: str) -> Object:
    spec = pod_spec(job, site, container=container, command=[])
    (main,) = spec["containers"]
    del main["command"]  # `ray start`, from the operator
    return {"metadata": {"labels": labels(name)}, "spec": spec}


def _submitter(job: JobSpec, site: Site) -> Object:
    """The small pod that hands the job in and follows its log."""
    spec = pod_spec(job, site, container="ray-job-submitter", command=[])
    spec["containers"] = [
        {
            "name": "ray-job-submitter",
            "image": job.image,
            "env": [{"name": "HOME", "value": "/tmp"}],  # noqa: S108 - the pod's own
            "resources": {
                "requests": {"cpu": "500m", "memory": "512Mi"},
                "limits": {"memory": "1Gi"},
            },
            "securityContext": restricted(),
            "volumeMounts": [{"name": "tmp", "mountPath": "/tmp"}],  # noqa: S108 - the pod's own
        }
    ]
    spec["volumes"] = [volume for volume in spec["volumes"] if volume["name"] == "tmp"]
    return spec
