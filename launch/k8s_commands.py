"""`jepa launch k8s`."""

import json as json_text
import sys
from dataclasses import asdict

from launch.commands import Flags, JsonFlag, Words
from launch.k8s import objects
from launch.k8s_submit import submit, try_out
from launch.k8s_text import to_yaml
from launch.request import Request, prepare
from pipeline.errors import ExitCode, UsageError


def k8s(
    *words: Words,
    print: bool = False,
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
