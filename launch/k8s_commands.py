"""`jepa launch k8s`."""

import json as json_text
import sys
from dataclasses import asdict

from launch.commands import Flags, JsonFlag, PrintFlag, Words
from launch.k8s import objects
from launch.k8s_submit import submit, try_out
from launch.k8s_text import to_yaml
from launch.request import Request, prepare
from launch.site import Site
from pipeline.errors import ExitCode, UsageError


def k8s(
    *words: Words,
    print: PrintFlag = False,
    dry_run: bool = False,
    request: Flags = None,
    json: JsonFlag = False,
) -> ExitCode:
    """Submit a job to Kubernetes: a training run, or preparation, probes or the conductor.

    Prints the job's name, its log, and how to watch, stop and pause it. The site file's `k8s.kind`
    says what a run becomes: jobset, job, trainjob or rayjob; other jobs are RayJobs.

    Args:
        words: CONFIG and key=value over it; with --kind what follows `jepa KIND`.
        print: Print the objects as YAML and submit nothing.
        dry_run: Ask the cluster whether it would take them, and submit nothing.
        request: What the job needs; the site file has the rest.
        json: Print the submission as JSON.
    """
    if not words:
        raise UsageError("expected CONFIG, or with --kind the words of that verb, got nothing")
    prepared = prepare(words, request or Request())
    _must_be_heard(request or Request(), prepared.site)
    made = objects(prepared.job, prepared.site)
    text = to_yaml(made)
    if print:
        sys.stdout.write(text)
        return ExitCode.DONE
    if dry_run:
        sys.stdout.write(try_out(text) + "\n")
        return ExitCode.DONE
    submitted = submit(prepared.job, made, text)
    shown = json_text.dumps(asdict(submitted.record), indent=2) if json else submitted.words
    sys.stdout.write(shown + "\n")
    return ExitCode.DONE


def _must_be_heard(request: Request, site: Site) -> None:
    """No flag is taken that no object would tell the cluster of."""
    if request.min_nodes is not None:
        raise UsageError(
            "--min-nodes is for Slurm: a Kubernetes job has the pods that it began with",
            remedy="After a loss for good launch the run again with fewer --nodes: it goes on from "
            "its checkpoint with the same clips and masks.",
        )
    if request.time is not None and request.kind == "train" and site.k8s.kind != "rayjob":
        raise UsageError(
            f"--time ends no {site.k8s.kind} of a training run",
            remedy="Add stop.max_hours=N or stop.at=TIME to the words: the run then saves and ends "
            "by itself.",
        )
