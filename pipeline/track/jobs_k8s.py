"""What Kubernetes says of a job, in the words that `jepa status` uses for every scheduler."""

import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from typing import Any

_ENDED = {"Complete": "finished", "Completed": "finished", "Failed": "failed"}
_RAY = {
    "": "queued", "Initializing": "starting", "Waiting": "starting", "Running": "running",
    "Complete": "finished", "Failed": "failed", "Suspending": "ending", "Suspended": "queued",
    "Retrying": "starting", "ValidationFailed": "failed",
}  # fmt: skip
_WAITS = "suspended: waits for its queue, or was paused"


def ask_k8s(stop: str, ask: Callable[[Sequence[str]], list[str]]) -> tuple[str, str]:
    """State and detail of a job.

    Args:
        stop: The command that deletes the job; it names namespace and object.
        ask: Runs a command and returns the lines it printed, none if it failed.
    """
    words = ["get" if word == "delete" else word for word in shlex.split(stop)]
    lines = ask([*words, "--output", "json"])
    found = json.loads("\n".join(lines)) if lines else {}
    # Of several that are gone kubectl prints an empty list.
    if not found or found.get("items") == []:
        return "unknown", "the cluster does not answer, or no longer knows it"
    return state_of(found)


def state_of(one: Mapping[str, Any]) -> tuple[str, str]:
    """State and detail by what an object of a JobSet, Job, TrainJob or RayJob says of itself.

    Of an array, the first state that is not over, and how many are in which.
    """
    if one.get("kind") == "List":
        states = [state_of(item)[0] for item in one["items"]]
        counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
        return next((s for s in states if s not in _ENDED.values()), states[-1]), counts
    spec, status = one.get("spec", {}), one.get("status", {})
    if one.get("kind") == "RayJob":
        state = _RAY.get(status.get("jobDeploymentStatus", ""), "unknown")
        return state, str(status.get("message", "")) if state == "failed" else ""
    met = {c["type"]: c for c in status.get("conditions", []) if c.get("status") == "True"}
    for kind, state in _ENDED.items():
        if kind in met:
            return state, "" if state == "finished" else str(met[kind].get("message", ""))
    if spec.get("suspend"):
        return "queued", _WAITS
    restarts = status.get("restarts", 0)
    return "running", f"{restarts} restarts" if restarts else ""
