"""What no schema says of a job's objects: rules of the server, of controllers, and our own."""

import re
from collections.abc import Iterator

from tests.k8s_objects import Object, inner_jobs, pod_templates

_SHM = "/dev/shm"  # noqa: S108 - a pod's own
_GIB = {"Ki": 2**-20, "Mi": 2**-10, "Gi": 1, "Ti": 2**10}
_ACTIONS = ("FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts")
# Room that the ranks need beside /dev/shm, in GiB.
_BESIDE_SHM = 2


def lint(one: Object, *, longest_save_seconds: float = 60) -> list[str]:
    """Every rule that an object breaks, in words."""
    found = [*_names(one)]
    for job in inner_jobs(one) if one["kind"] in ("Job", "JobSet", "TrainingRuntime") else []:
        found += _job(job, is_counted=one["kind"] != "TrainingRuntime")
        found += _disruption(job, is_gang=one["kind"] != "Job")
    for template in pod_templates(one):
        found += [*_pod(template["spec"]), *restricted(template["spec"])]
        if one["kind"] != "RayJob":
            found += _training(template["spec"], longest_save_seconds)
    if one["kind"] in ("JobSet", "TrainingRuntime"):
        found += _gang(one)
    if one["kind"] in ("JobSet", "Job"):
        found += _meeting(one)
    return found


def lint_together(found: list[Object]) -> Iterator[str]:
    """Names and labels by which objects of one job refer to each other."""
    templates = [template for one in found for template in pod_templates(one)]
    names = {(one["kind"], one["metadata"]["name"]) for one in found}
    labelled = [template["metadata"]["labels"] for template in templates]
    if not all(any(_is_guarded(has, one) for one in found) for has in labelled):
        yield "pods of other jobs may reach a pod"
    for template in templates:
        for volume in template["spec"].get("volumes", []):
            if "configMap" in volume and ("ConfigMap", volume["configMap"]["name"]) not in names:
                yield f"there is no ConfigMap {volume['configMap']['name']}"
    for one in found:
        yield from _selected(one, labelled)
        if one["kind"] == "Job":
            subdomain = one["spec"]["template"]["spec"].get("subdomain")
            if ("Service", subdomain) not in names:
                yield f"no Service gives the pods names below {subdomain}"


def _selected(one: Object, labelled: list[Object]) -> Iterator[str]:
    if one["kind"] == "Service" and not one["spec"].get("publishNotReadyAddresses"):
        yield "pods cannot find each other before they are ready"
    if one["kind"] in ("Service", "NetworkPolicy"):
        spec = one["spec"]
        wanted = spec["selector"] if "selector" in spec else spec["podSelector"]["matchLabels"]
        if not any(wanted.items() <= has.items() for has in labelled):
            yield f"{one['kind']} {one['metadata']['name']} selects no pod"


def _is_guarded(labels: Object, one: Object) -> bool:
    if one["kind"] != "NetworkPolicy" or "Ingress" not in one["spec"]["policyTypes"]:
        return False
    return one["spec"]["podSelector"]["matchLabels"].items() <= labels.items()


def restricted(spec: Object) -> Iterator[str]:
    """The profile `restricted` of the Pod Security Standards, and a read-only root beside it."""
    pod = spec.get("securityContext", {})
    for key in ("hostNetwork", "hostPID", "hostIPC"):
        if spec.get(key):
            yield f"{key} is set"
    for volume in spec.get("volumes", []):
        allowed = {"configMap", "emptyDir", "persistentVolumeClaim", "secret", "projected"}
        if not allowed & volume.keys():
            yield f"volume {volume['name']} is of a kind that is not allowed"
    for container in [*spec.get("initContainers", []), *spec["containers"]]:
        for fault in _lax(container, pod):
            yield f"{container['name']} {fault}"


def _lax(container: Object, pod: Object) -> Iterator[str]:
    own = container.get("securityContext", {})
    both, capabilities = {**pod, **own}, own.get("capabilities", {})
    added = set(capabilities.get("add", [])) - {"NET_BIND_SERVICE"}
    rules = {
        "may run as root": both.get("runAsNonRoot") is True and both.get("runAsUser", 1) != 0,
        "may escalate": own.get("allowPrivilegeEscalation") is False,
        "is privileged": not own.get("privileged"),
        "keeps capabilities": capabilities.get("drop") == ["ALL"] and not added,
        "has no seccomp profile": both.get("seccompProfile", {}).get("type") == "RuntimeDefault",
        "can write to its image": own.get("readOnlyRootFilesystem") is True,
        "takes a port of the host": not any("hostPort" in p for p in container.get("ports", [])),
    }
    yield from (fault for fault, holds in rules.items() if not holds)


def _names(one: Object) -> Iterator[str]:
    name = one["metadata"]["name"]
    if re.fullmatch(r"[a-z]([a-z0-9-]*[a-z0-9])?", name) is None:
        yield f"{name} is no DNS label"
    if one["kind"] == "JobSet":
        for part in one["spec"]["replicatedJobs"]:
            pods = part["template"]["spec"].get("parallelism", 1)
            longest = f"{name}-{part['name']}-{part.get('replicas', 1) - 1}-{pods - 1}-abcde"
            if len(longest) > 63:
                yield f"pod name {longest} has more than 63 characters"


def _job(job: Object, *, is_counted: bool) -> Iterator[str]:
    spec = job["template"]["spec"]
    containers = {container["name"] for container in spec["containers"]}
    policy = job.get("podFailurePolicy")
    if policy and spec.get("restartPolicy") != "Never":
        yield "podFailurePolicy needs restartPolicy Never"
    for rule in (policy or {}).get("rules", []):
        yield from _failure_rule(rule, containers)
    if job.get("completionMode") != "Indexed":
        yield "pods need completionMode Indexed to know their place"
    if is_counted and job.get("completions") != job.get("parallelism"):
        yield "completions are not parallelism: pods would wait for others that are not started"


def _disruption(job: Object, *, is_gang: bool) -> Iterator[str]:
    """A drain or preemption is nobody's fault, and two pods of one place would both write."""
    actions = [
        rule["action"]
        for rule in job.get("podFailurePolicy", {}).get("rules", [])
        if any(c["type"] == "DisruptionTarget" for c in rule.get("onPodConditions", []))
    ]
    if actions != ["FailJob" if is_gang else "Ignore"]:
        yield f"a disruption is taken for a failure: {actions}"
    if job.get("podReplacementPolicy") != "Failed":
        yield "a pod that still saves would be replaced"


def _meeting(one: Object) -> Iterator[str]:
    """Whom the ranks look for, and how many they take themselves to be."""
    (job,) = inner_jobs(one)
    name, subdomain = one["metadata"]["name"], job["template"]["spec"].get("subdomain")
    if one["kind"] == "JobSet":
        (part,) = one["spec"]["replicatedJobs"]
        name, subdomain = f"{name}-{part['name']}-0", one["spec"]["network"].get("subdomain")
    env = {e["name"]: e.get("value") for e in job["template"]["spec"]["containers"][0]["env"]}
    if env.get("MASTER_ADDR") != f"{name}-0.{subdomain}":
        yield f"no pod is called {env.get('MASTER_ADDR')}"
    if env.get("JEPA_NODES") != str(job.get("completions")):
        yield f"{job.get('completions')} pods are told that they are {env.get('JEPA_NODES')}"


def _failure_rule(rule: Object, containers: set[str]) -> Iterator[str]:
    if rule["action"] not in ("FailJob", "Ignore", "Count", "FailIndex"):
        yield f"no such action: {rule['action']}"
    codes = rule.get("onExitCodes")
    if codes is None:
        return
    values = codes["values"]
    if len(set(values)) != len(values) or 0 in values or not values:
        yield f"exit codes must be unique and not 0: {values}"
    if 75 in values:
        yield "75 must be counted: survivors of a crash end with it, too"
    if codes.get("containerName", next(iter(containers))) not in containers:
        yield f"no container is called {codes['containerName']}"
    if codes["operator"] not in ("In", "NotIn"):
        yield f"no such operator: {codes['operator']}"


def _gang(one: Object) -> Iterator[str]:
    spec = one["spec"]["template"]["spec"] if one["kind"] == "TrainingRuntime" else one["spec"]
    parts = {part["name"] for part in spec["replicatedJobs"]}
    rules = spec.get("failurePolicy", {}).get("rules", [])
    yield from _gang_rules(rules, parts)
    if any(job.get("backoffLimit") != 0 for job in inner_jobs(one)):
        yield "a lost pod must fail its Job, so that all start again"
    if spec.get("failurePolicy", {}).get("restartStrategy") != "BlockingRecreate":
        yield "new pods would write beside old ones that still save"
    if not spec.get("network", {}).get("publishNotReadyAddresses"):
        yield "pods cannot find each other before they are ready"


def _gang_rules(rules: list[Object], parts: set[str]) -> Iterator[str]:
    names = [rule["name"] for rule in rules]
    if len(set(names)) != len(names):
        yield f"names of rules are not unique: {names}"
    for rule in rules:
        if re.fullmatch(r"[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?", rule["name"]) is None:
            yield f"no name for a rule: {rule['name']}"
        if rule["action"] not in _ACTIONS:
            yield f"no such action: {rule['action']}"
        unknown = set(rule.get("targetReplicatedJobs", [])) - parts
        if unknown:
            yield f"no part is called {', '.join(unknown)}"


def _pod(spec: Object) -> Iterator[str]:
    volumes = {volume["name"] for volume in spec.get("volumes", [])}
    for container in spec["containers"]:
        name = container["name"]
        missing = {mount["name"] for mount in container.get("volumeMounts", [])} - volumes
        if missing:
            yield f"{name} mounts {', '.join(missing)}, which no volume is"
        image = container.get("image", "")
        tag = image.rpartition("/")[2].partition(":")[2]
        if not (tag or "@sha256:" in image) or tag == "latest":
            yield f"image {image} is not the same at every start"
        limits = container.get("resources", {}).get("limits", {})
        requests = container.get("resources", {}).get("requests", {})
        if "memory" not in limits:
            yield f"{name} has no limit on memory"
        for key, value in limits.items():
            if "/" in key and requests.get(key, value) != value:
                yield f"{key} must be requested as it is limited"
    unasked = {
        "automountServiceAccountToken": "the pod gets a token of the cluster that it does not need",
        "enableServiceLinks": "a variable of some Service of the namespace might be one of ours",
    }
    yield from (fault for key, fault in unasked.items() if spec.get(key) is not False)


def _training(spec: Object, longest_save_seconds: float) -> Iterator[str]:
    (container,) = spec["containers"]
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    shm = next((v for v in spec["volumes"] if v["name"] == mounts.get(_SHM)), {})
    directory = shm.get("emptyDir", {})
    if directory.get("medium") != "Memory" or "sizeLimit" not in directory:
        yield f"{_SHM} is not memory with a limit"
    elif "memory" in container["resources"]["limits"]:
        room = _gib(container["resources"]["limits"]["memory"]) - _gib(directory["sizeLimit"])
        if room < _BESIDE_SHM:
            yield f"{_SHM} leaves {room:g} GiB of the pod's memory"
    if spec["terminationGracePeriodSeconds"] <= longest_save_seconds:
        yield "the grace period is shorter than the longest save"
    hook = container.get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command", [])
    if "/dev/termination-log" not in " ".join(hook):
        yield "nothing tells an eviction from a fault afterwards"
    command = container.get("command", [])
    if command[:3] != ["python", "-m", "launch.k8s_pod"]:
        yield f"process 1 is not ours: {' '.join(command[:3])}"
    env = {one["name"]: one.get("value") for one in container["env"]}
    ranks, gpus = env.get("JEPA_RANKS_PER_NODE"), container["resources"]["limits"]
    counts = [value for key, value in gpus.items() if key.endswith("/gpu")]
    if ranks is not None and counts and counts != [ranks]:
        yield f"{counts[0]} GPUs for {ranks} ranks"


def _gib(quantity: str) -> float:
    return float(quantity[:-2]) * _GIB[quantity[-2:]]
