"""Sends a run's records to MLflow from a process of its own.

Started by `mlflow_sink` with a job on standard input. What has been sent is kept in the run's
mlflow.json, as the byte of metrics.jsonl to go on from: after an outage, or in the next start of
the run, sending goes on there. Points carry the time of their line, by which MLflow recognises one
that it was sent before: a batch whose answer was lost leaves no duplicates.
"""

import fcntl
import json
import os
import select
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from pipeline.track.folder import SYSTEM_FILE
from pipeline.track.jsonl import JsonLinesWriter
from pipeline.track.mlflow_job import UploadJob
from pipeline.track.mlflow_upload import Uploader
from pipeline.track.system import SystemSampler

_LOCK_FILE = ".mlflow.lock"
_FINAL_PAUSE_SECONDS = 0.5


class Inbox:
    """Messages of the run, one JSON object per line, until it closes its end or dies."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._pending = b""
        self.ended = False

    def wait(self, seconds: float) -> list[dict[str, Any]]:
        """Messages that are there, or come within the given time."""
        ready, _, _ = select.select([self._descriptor], [], [], max(0.0, seconds))
        if not ready:
            return []
        content = os.read(self._descriptor, 2**16)
        self.ended = not content
        *lines, self._pending = (self._pending + content).split(b"\n")
        return [json.loads(line) for line in lines if line]


def serve(job: UploadJob, inbox: Inbox, messages: list[dict[str, Any]]) -> int:
    """Sends what appears in the run's files until the run closes its end, then the rest.

    Returns:
        0 if MLflow has everything, 1 if something is left for the next start.
    """
    uploader = Uploader(job)
    next_sample = 0.0
    every = job.system_metrics_every_seconds
    sampler = SystemSampler() if every is not None else None
    status, seconds = "died", 5.0
    while True:
        for message in messages:
            if "artifact" in message:
                uploader.add_artifact(Path(message["artifact"]))
            if "close" in message:
                status, seconds = message["close"], float(message["seconds"])
        if inbox.ended:
            break
        if sampler is not None and every is not None and time.monotonic() >= next_sample:
            next_sample = time.monotonic() + every
            _record_sample(job, sampler)
        uploader.work()
        messages = inbox.wait(min(job.upload_every_seconds, every or job.upload_every_seconds))
    return _finish(uploader, status, seconds)


def main() -> int:
    """Reads the job from standard input and serves it."""
    inbox = Inbox(sys.stdin.fileno())
    messages: list[dict[str, Any]] = []
    while not messages and not inbox.ended:
        messages = inbox.wait(60.0)
    if not messages:
        return 1
    job = UploadJob(**messages[0])
    with _only_one(Path(job.run_dir)):
        return serve(job, inbox, messages[1:])


def _finish(uploader: Uploader, status: str, seconds: float) -> int:
    deadline = time.monotonic() + seconds
    while not uploader.work(at_once=True):
        if time.monotonic() > deadline:
            return 1
        time.sleep(_FINAL_PAUSE_SECONDS)
    return 0 if uploader.end(status) else 1


def _record_sample(job: UploadJob, sampler: SystemSampler) -> None:
    writer = JsonLinesWriter(Path(job.run_dir) / SYSTEM_FILE)
    writer.write({"time": time.time(), **sampler.sample()})
    writer.close()


def _only_one(run_dir: Path) -> IO[str]:
    """Waits for the worker of an earlier attempt, which may still be sending its last points."""
    lock = (run_dir / _LOCK_FILE).open("w")
    with suppress(OSError):  # A file system without locks: two workers only send things twice.
        fcntl.flock(lock, fcntl.LOCK_EX)
    return lock


if __name__ == "__main__":
    sys.exit(main())
