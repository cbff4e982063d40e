"""Reads objects of Kubernetes and holds them against what a cluster would check.

Built-in kinds: the schemas of two versions of Kubernetes. Custom kinds: JSON schemas in the folder
that JEPA_K8S_SCHEMAS names, with the rules in CEL that they carry. What admission webhooks and
controllers check beyond that is in `tests.k8s_lint`, as far as it is known.
"""

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import celpy
import kubernetes_validate
from celpy.adapter import json_to_cel
from jsonschema import Draft202012Validator
from ruamel.yaml import YAML

VERSIONS = ("1.32", "1.37")
SCHEMAS = os.environ.get("JEPA_K8S_SCHEMAS")
NO_SCHEMAS = "JEPA_K8S_SCHEMAS names no folder with the JSON schemas of JobSet, Kueue, KubeRay …"
NO_KUBECTL = "there is no kubectl 1.27 or newer"
RUNNING = ("Job", "JobSet", "RayJob", "TrainingRuntime")
Object = dict[str, Any]


def read_objects(text: str) -> list[Object]:
    """Documents of a YAML text, as a reader of YAML 1.1 takes them (which kubectl is)."""
    yaml = YAML(typ="safe", pure=True)
    yaml.version = (1, 1)
    return [json.loads(json.dumps(one)) for one in yaml.load_all(text) if one]


def kustomize(folder: Path) -> list[Object]:
    """What kubectl builds from a folder."""
    command = ["kubectl", "kustomize", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return read_objects(done.stdout)


def faults(one: Object) -> list[str]:
    """What the schemas have against an object."""
    if "." in one["apiVersion"].partition("/")[0] and not is_built_in(one):
        return [*_custom_faults(one), *inner_faults(one)]
    return built_in_faults(one)


def is_built_in(one: Object) -> bool:
    return one["apiVersion"].endswith("k8s.io/v1") and one["kind"] == "NetworkPolicy"


def built_in_faults(one: Object) -> list[str]:
    found = []
    for version in VERSIONS:
        try:
            kubernetes_validate.validate(one, version, strict=True)
        except kubernetes_validate.ValidationError as error:
            found.append(f"{version}: {error.message}")
    return found


def inner_faults(one: Object) -> list[str]:
    """Jobs and pods inside of custom objects, held against the schemas of the built-in ones."""
    found = []
    metadata = {"name": "inner"}
    for spec in inner_jobs(one):
        job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": metadata, "spec": spec}
        found += built_in_faults(job)
    if one["kind"] == "RayJob":
        for template in pod_templates(one):
            pod = {"apiVersion": "v1", "kind": "Pod", "metadata": metadata}
            found += built_in_faults({**pod, "spec": template["spec"]})
    return found


def inner_jobs(one: Object) -> list[Object]:
    """Specs of the Jobs that an object makes."""
    if one["kind"] not in RUNNING:
        return []
    if one["kind"] == "Job":
        return [one["spec"]]
    spec = one["spec"]["template"]["spec"] if one["kind"] == "TrainingRuntime" else one["spec"]
    return [part["template"]["spec"] for part in spec.get("replicatedJobs", [])]


def pod_templates(one: Object) -> list[Object]:
    """All pods that an object makes."""
    if one["kind"] != "RayJob":
        return [job["template"] for job in inner_jobs(one)]
    cluster = one["spec"]["rayClusterSpec"]
    groups = [cluster["headGroupSpec"], *cluster.get("workerGroupSpecs", [])]
    return [*(group["template"] for group in groups), one["spec"]["submitterPodTemplate"]]


@cache
def schema_of(kind: str) -> Object | None:
    for path in Path(SCHEMAS or "/nowhere").glob(f"{kind.lower()}-*.json"):
        return json.loads(path.read_text())
    return None


def _custom_faults(one: Object) -> list[str]:
    schema = schema_of(one["kind"])
    if schema is None:
        return [f"no schema of {one['kind']}"]
    found = [
        f"{error.json_path}: {error.message[:200]}"
        for error in Draft202012Validator(schema).iter_errors(one)
    ]
    return [*found, *rule_faults(schema, schema, one, "$")]


def rule_faults(root: Object, schema: Object, value: Any, at: str) -> list[str]:
    """What the rules in CEL say of a value and of everything in it."""
    while "$ref" in schema:
        target: Any = root
        for word in schema["$ref"].split("/")[1:]:
            target = target[word]
        schema = target
    found = [
        f"{at}: {rule.get('message', rule['rule'])}"
        for rule in schema.get("x-kubernetes-validations", [])
        # Rules on the old value bind when an object is changed.
        if "oldSelf" not in rule["rule"] and not holds(rule["rule"], value)
    ]
    for inner, below, where in _children(schema, value, at):
        found += rule_faults(root, inner, below, where)
    return found


def _children(schema: Object, value: Any, at: str) -> Iterator[tuple[Object, Any, str]]:
    if isinstance(value, dict):
        rest = schema.get("additionalProperties")
        for key, below in value.items():
            inner = schema.get("properties", {}).get(key, rest)
            if isinstance(inner, dict):
                yield inner, below, f"{at}.{key}"
    elif isinstance(value, list) and isinstance(schema.get("items"), dict):
        for number, below in enumerate(value):
            yield schema["items"], below, f"{at}[{number}]"


def holds(rule: str, value: Any) -> bool:
    return bool(program(rule).evaluate({"self": json_to_cel(value)}))


@cache
def program(rule: str) -> celpy.Runner:
    environment = celpy.Environment()
    return environment.program(environment.compile(rule))


def kubectl_is_new() -> bool:
    """Kustomize's components came with kubectl 1.21; what is written here is tried from 1.27 on."""
    if shutil.which("kubectl") is None:
        return False
    words = ["kubectl", "version", "--client"]
    told = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False).stdout
    found = re.search(r"v1\.(\d+)", told)
    return found is not None and int(found[1]) >= 27
