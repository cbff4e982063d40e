"""Objects of Kubernetes are what a cluster takes, and broken ones are found out."""

import copy
import re
from pathlib import Path

import pytest

from launch.job import NEVER_AGAIN
from launch.k8s_files import FOLDER, rendered_files
from launch.site import Site
from pipeline.config.load import load_config
from pipeline.errors import ExitCode
from pipeline.run import RunConfig
from tests.k8s_lint import lint, lint_together, restricted
from tests.k8s_objects import (
    NO_KUBECTL,
    NO_SCHEMAS,
    RUNNING,
    SCHEMAS,
    Object,
    faults,
    kubectl_is_new,
    kustomize,
    pod_templates,
    read_objects,
)

BUILT_IN = ("ConfigMap", "Service", "Job", "NetworkPolicy", "Namespace", "PersistentVolumeClaim")
WAYS = sorted(path.parent.name for path in rendered_files())
OVERLAYS = [*sorted((FOLDER / "overlays").iterdir()), FOLDER / "kueue"]
needs_kubectl = pytest.mark.skipif(not kubectl_is_new(), reason=NO_KUBECTL)
needs_schemas = pytest.mark.skipif(not SCHEMAS, reason=NO_SCHEMAS)


def rendered(way: str) -> list[Object]:
    return read_objects(rendered_files()[FOLDER / "overlays" / way / "job.yaml"])


def main_of(way: str) -> Object:
    return next(one for one in rendered(way) if one["kind"] in RUNNING)


def test_the_files_in_k8s_are_what_is_rendered():
    stale = [path for path, text in rendered_files().items() if path.read_text() != text]
    assert not stale, "run `python -m launch.k8s_files`"


@pytest.mark.parametrize("name", ["run.yaml", "run-cpu.yaml"])
def test_the_example_runs_are_configurations(name):
    run = load_config(FOLDER / name, RunConfig).config
    site = load_config(FOLDER / f"site-{'cpu' if 'cpu' in name else 'gpu'}.yaml", Site).config
    ranks = site.nodes * (site.ranks_per_node or site.gpus_per_node)
    assert run.global_batch % (run.stages[0].micro_batch * ranks) == 0
    assert run.stop.grace_seconds == site.grace_seconds - 30


@pytest.mark.parametrize("way", WAYS)
def test_every_rendered_object_is_taken(way):
    found = rendered(way)
    assert len(found) >= 3
    assert not list(lint_together(found))
    for one in found:
        assert not (lint(one) if one["kind"] in RUNNING else [])
        if one["kind"] in BUILT_IN or SCHEMAS:
            assert not faults(one), one["kind"]


@needs_kubectl
@pytest.mark.parametrize("folder", OVERLAYS, ids=lambda path: path.name)
def test_kustomize_builds_every_overlay_into_objects_that_are_taken(folder):
    found = kustomize(folder)
    for one in found:
        assert not (lint(one) if one["kind"] in RUNNING else [])
        if one["kind"] in BUILT_IN or SCHEMAS:
            assert not faults(one), one["kind"]
    if folder.name != "kueue":
        assert {"Namespace", "PersistentVolumeClaim"} < {one["kind"] for one in found}
        assert {one["metadata"].get("namespace", "jepa") for one in found} == {"jepa"}


@needs_kubectl
def test_components_add_what_they_are_called():
    (pod,) = pod_templates(jobset_in(FOLDER / "overlays" / "jobset-rdma"))
    limits = pod["spec"]["containers"][0]["resources"]["limits"]
    assert limits["rdma/hca"] == "8"
    assert [key.partition("podset-")[2] for key in pod["metadata"]["annotations"]] == [
        "required-topology"
    ]
    (pod,) = pod_templates(jobset_in(FOLDER / "overlays" / "jobset-object-storage"))
    assert pod["spec"]["containers"][0]["envFrom"] == [{"secretRef": {"name": "jepa-s3"}}]
    assert pod["spec"]["imagePullSecrets"] == [{"name": "registry"}]


def jobset_in(folder: Path) -> Object:
    return next(one for one in kustomize(folder) if one["kind"] == "JobSet")


# What is broken, in which of the rendered objects, and who finds it: the schemas or our own rules.
POD = "spec.replicatedJobs.0.template.spec.template.spec"
JOB = "spec.replicatedJobs.0.template.spec"
BREAKAGES = [
    ("jobset", f"{POD}.containers.0.imagePullPolicies", "Always", "schema"),
    ("jobset", f"{POD}.containers.0.resources.limits.memory", "lots", "schema"),
    ("jobset", f"{POD}.terminationGracePeriodSeconds", "long", "schema"),
    ("jobset", "spec.failurePolicy.restartStrategy", "Sometimes", "schema"),
    ("jobset", "spec.failurePolicy.rules.0.action", "Explode", "schema"),
    ("jobset", f"{JOB}.podFailurePolicy.rules.0.onExitCodes.values", "78", "schema"),
    ("jobset", "spec.replicatedJobs.0.replicas", "one", "schema"),
    ("jobset", "spec.network.enableDNSHostname", True, "schema"),
    ("jobset", f"{POD}.volumes.0.emptyDir.size", "1Gi", "schema"),
    ("indexed-job", "spec.parallellism", 2, "schema"),
    ("indexed-job", "spec.template.spec.containers.0.env.0.values", "2", "schema"),
    ("indexed-job", "spec.podFailurePolicy.rules.0.onExitCodes.operator", None, "schema"),
    ("trainjob", "spec.mlPolicy.mpi", {}, "schema"),
    ("trainjob", "spec.template.spec.replicatedJobs.0.name", None, "schema"),
    ("ray-prep", "spec.rayClusterSpec.authOptions.mode", "none", "schema"),
    ("ray-prep", "spec.rayClusterSpec.headGroupSpec.template.spec.containers", None, "schema"),
    ("ray-prep", "spec.backoffLimit", "three", "schema"),
    ("jobset", "spec.failurePolicy.rules.0.name", "never again", "lint"),
    ("jobset", "spec.failurePolicy.rules.1.name", "neveragain", "lint"),
    ("jobset", "spec.failurePolicy.rules.0.targetReplicatedJobs", ["trainer"], "lint"),
    ("jobset", f"{POD}.restartPolicy", "OnFailure", "lint"),
    ("jobset", f"{JOB}.podFailurePolicy.rules.0.onExitCodes.containerName", "main", "lint"),
    ("jobset", f"{JOB}.podFailurePolicy.rules.0.onExitCodes.values", [78, 78], "lint"),
    ("jobset", f"{JOB}.podFailurePolicy.rules.0.onExitCodes.values", [0, 78], "lint"),
    ("jobset", f"{JOB}.podFailurePolicy.rules.0.onExitCodes.values", [75, 78], "lint"),
    ("jobset", f"{JOB}.backoffLimit", 3, "lint"),
    ("jobset", f"{JOB}.completions", 3, "lint"),
    ("jobset", f"{JOB}.completionMode", "NonIndexed", "lint"),
    ("jobset", f"{JOB}.podFailurePolicy.rules.1.action", "Ignore", "lint"),
    ("jobset", f"{JOB}.podFailurePolicy.rules.1", None, "lint"),
    ("indexed-job", "spec.podFailurePolicy.rules.1.action", "FailJob", "lint"),
    ("jobset", f"{JOB}.podReplacementPolicy", "TerminatingOrFailed", "lint"),
    ("jobset", "spec.failurePolicy.restartStrategy", "Recreate", "lint"),
    ("jobset", "metadata.name", "another", "lint"),
    ("jobset", "spec.network.subdomain", "another", "lint"),
    ("indexed-job", "spec.template.spec.subdomain", "another", "lint"),
    ("jobset", f"{POD}.containers.0.env.0.value", "3", "lint"),
    ("jobset", f"{POD}.containers.0.env.1.value", "4", "lint"),
    ("jobset", f"{POD}.containers.0.lifecycle", None, "lint"),
    ("jobset", f"{POD}.enableServiceLinks", None, "lint"),
    ("jobset", "metadata.name", "a" * 55, "lint"),
    ("jobset", f"{POD}.volumes.0.name", "memory", "lint"),
    ("jobset", f"{POD}.volumes.0.emptyDir.medium", "", "lint"),
    ("jobset", f"{POD}.volumes.0.emptyDir.sizeLimit", "2Ti", "lint"),
    ("jobset", f"{POD}.terminationGracePeriodSeconds", 30, "lint"),
    ("jobset", f"{POD}.containers.0.command", ["bash", "-c", "jepa train; true"], "lint"),
    ("jobset", f"{POD}.containers.0.image", "registry.example:5000/jepa", "lint"),
    ("jobset", f"{POD}.containers.0.image", "jepa:latest", "lint"),
    ("jobset", f"{POD}.containers.0.resources.limits", {}, "lint"),
    ("jobset", f"{POD}.automountServiceAccountToken", None, "lint"),
    ("jobset", "spec.network.publishNotReadyAddresses", False, "lint"),
    ("jobset", f"{POD}.hostNetwork", True, "lint"),
    ("jobset", f"{POD}.securityContext.runAsNonRoot", False, "lint"),
    ("jobset", f"{POD}.securityContext.seccompProfile", None, "lint"),
    ("jobset", f"{POD}.containers.0.securityContext.allowPrivilegeEscalation", True, "lint"),
    ("jobset", f"{POD}.containers.0.securityContext.capabilities.add", ["IPC_LOCK"], "lint"),
    ("jobset", f"{POD}.containers.0.securityContext.readOnlyRootFilesystem", None, "lint"),
    ("jobset", f"{POD}.volumes.1", {"name": "scratch", "hostPath": {"path": "/"}}, "lint"),
    ("ray-prep", "spec.submitterPodTemplate.spec.containers.0.securityContext", {}, "lint"),
]


def with_change(one: Object, path: str, value: object) -> Object:
    """The object with one value set, or taken out if it is None."""
    broken = copy.deepcopy(one)
    *folders, last = (int(word) if word.isdigit() else word for word in path.split("."))
    inner = broken
    for word in folders:
        inner = inner[word]
    if value is None:
        del inner[last]
    else:
        inner[last] = value
    return broken


@pytest.mark.parametrize(("way", "path", "value", "finder"), BREAKAGES)
def test_a_broken_object_is_found_out(way, path, value, finder):
    one = main_of(way)
    if finder == "schema" and one["kind"] not in BUILT_IN and not SCHEMAS:
        pytest.skip(NO_SCHEMAS)
    broken = with_change(one, path, value)
    assert (faults if finder == "schema" else lint)(broken), path


@pytest.mark.parametrize(
    ("kind", "path", "value"),
    [
        ("Service", "spec.selector", {"app.kubernetes.io/instance": "other"}),
        ("Service", "metadata.name", "other"),
        ("Service", "spec.publishNotReadyAddresses", False),
        ("NetworkPolicy", "spec.podSelector.matchLabels", {"app.kubernetes.io/instance": "other"}),
        ("NetworkPolicy", "spec.policyTypes", ["Egress"]),
        ("ConfigMap", "metadata.name", "other"),
    ],
)
def test_objects_that_do_not_fit_together_are_found_out(kind, path, value):
    found = rendered("indexed-job")
    broken = [with_change(one, path, value) if one["kind"] == kind else one for one in found]
    assert broken != found
    assert list(lint_together(broken)), path


HOSTNAME = {"nodeLabel": "kubernetes.io/hostname"}


@needs_schemas
@pytest.mark.parametrize(
    ("kind", "path", "value", "says"),
    [
        ("TrainingRuntime", "spec.mlPolicy.mpi", {}, "Only one of the policy"),
        ("RayJob", "spec.deletionStrategy", {"onSuccess": {"policy": "DeleteSelf"}}, "BOTH"),
        ("RayJob", "spec.managedBy", "me", "managedBy"),
        ("Topology", "spec.levels", [HOSTNAME, {"nodeLabel": "a.b/rack"}], "lowest level"),
        ("Topology", "spec.levels", [HOSTNAME, HOSTNAME], "must be unique"),
        ("ClusterQueue", "spec.resourceGroups.0.coveredResources", ["cpu"], "same number"),
        ("ResourceFlavor", "spec.tolerations.0.value", "x", "must be empty"),
        ("ResourceFlavor", "spec.nodeLabels", {}, "at least one nodeLabel"),
    ],
)
def test_rules_in_cel_are_run(kind, path, value, says):
    ours = [*rendered("trainjob"), *rendered("ray-prep")]
    queues = (read_objects(file.read_text()) for file in (FOLDER / "kueue").glob("*.yaml"))
    (one,) = [o for o in [*ours, *(o for file in queues for o in file)] if o["kind"] == kind]
    assert not faults(one)
    assert any(says in fault for fault in faults(with_change(one, path, value)))


@pytest.mark.parametrize("way", WAYS)
def test_every_pod_has_the_restricted_profile(way):
    templates = [pod for one in rendered(way) for pod in pod_templates(one)]
    assert templates
    for template in templates:
        assert not list(restricted(template["spec"]))
        assert template["spec"]["securityContext"]["runAsUser"] != 0


def test_exit_codes_that_no_start_mends_end_a_job_and_no_others():
    assert {int(code) for code in NEVER_AGAIN} == {2, 65, 78, 79, 93}
    policy = main_of("jobset")["spec"]["failurePolicy"]["rules"]
    said = "Container train for pod jepa/example-node-0-0-x failed with exit code {} matching {}"
    lost = "Pod jepa/example-node-0-1-x has condition DisruptionTarget matching FailJob rule"
    for code in ExitCode:
        message = said.format(int(code), "FailJob rule at index 0")
        matched = [rule["name"] for rule in policy if matches(rule, message)]
        assert matched == (["neveragain"] if code in NEVER_AGAIN else [])
    assert [rule["name"] for rule in policy if matches(rule, lost)] == ["disrupted"]


def matches(rule: Object, message: str) -> bool:
    return any(re.search(pattern, message) for pattern in rule["onJobFailureMessagePatterns"])
