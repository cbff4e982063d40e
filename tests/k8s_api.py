"""As much of a Kubernetes API server as kubectl needs to run the commands that a submission prints.

It knows kinds and names, answers, and notes what it was asked; nothing runs. On the loopback
interface, for the test's own kubectl.
"""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

GROUPS = {
    "jobset.x-k8s.io/v1alpha2": ("JobSet", "jobsets"),
    "ray.io/v1": ("RayJob", "rayjobs"),
    "kueue.x-k8s.io/v1beta2": ("Workload", "workloads"),
}
_VERBS = ["get", "list", "patch", "delete"]


@dataclass
class ApiServer:
    """What it holds, and what it was asked."""

    objects: dict[str, dict[str, Any]]
    """By the path below the namespace, such as `jobsets/a`."""
    asked: list[tuple[str, str, str]] = field(default_factory=list)
    """Verb, path below the namespace, and the selector or the body."""

    def answer(self, verb: str, url: str, body: str) -> dict[str, Any] | str:
        """What a request gets."""
        path, query = urlsplit(url).path, parse_qs(urlsplit(url).query)
        found = _discovery(path)
        if found is not None:
            return found
        below = path.partition("/namespaces/jepa/")[2]
        selector = query.get("labelSelector", [""])[0]
        self.asked.append((verb, below, body or selector))
        if below.endswith("/log"):
            return "step 1\n"
        if "/" not in below:
            named = [one for key, one in self.objects.items() if key.startswith(f"{below}/")]
            kind = "PodList" if below == "pods" else "List"
            return {"kind": kind, "apiVersion": "v1", "metadata": {}, "items": named}
        found = self.objects.get(below)
        if verb == "DELETE":
            self.objects.pop(below, None)
        gone = {"kind": "Status", "status": "Failure", "reason": "NotFound", "code": 404}
        return found or gone


def _discovery(path: str) -> dict[str, Any] | None:
    if path == "/api":
        return {"kind": "APIVersions", "versions": ["v1"]}
    if path == "/apis":
        groups = [_group(*version.split("/")) for version in GROUPS]
        return {"kind": "APIGroupList", "apiVersion": "v1", "groups": groups}
    if path == "/api/v1":
        return _resources("v1", "Pod", "pods")
    version = path.removeprefix("/apis/")
    return _resources(version, *GROUPS[version]) if version in GROUPS else None


def _group(name: str, version: str) -> dict[str, Any]:
    told = {"groupVersion": f"{name}/{version}", "version": version}
    return {"name": name, "versions": [told], "preferredVersion": told}


def _resources(version: str, kind: str, name: str) -> dict[str, Any]:
    told = {"name": name, "singularName": kind.lower(), "namespaced": True, "kind": kind}
    resources = [{**told, "verbs": _VERBS}]
    return {"kind": "APIResourceList", "groupVersion": version, "resources": resources}


@contextmanager
def serving(objects: dict[str, dict[str, Any]], folder: Path) -> Iterator[ApiServer]:
    """Serves; `folder` gets the `config` file by which kubectl finds it."""
    api = ApiServer(objects)

    class Handler(BaseHTTPRequestHandler):
        def _do(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
            answer = api.answer(self.command, self.path, body)
            text = answer if isinstance(answer, str) else json.dumps(answer)
            self.send_response(404 if '"NotFound"' in text else 200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text.encode())

        do_GET = do_PATCH = do_DELETE = _do

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    cluster = {"name": "c", "cluster": {"server": f"http://127.0.0.1:{server.server_port}"}}
    context = {"name": "c", "context": {"cluster": "c", "user": ""}}
    settings = {"clusters": [cluster], "contexts": [context], "current-context": "c"}
    (folder / "config").write_text(json.dumps({"kind": "Config", "apiVersion": "v1", **settings}))
    try:
        yield api
    finally:
        server.shutdown()
        server.server_close()
