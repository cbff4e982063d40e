"""An address where Prometheus reads how a run is doing; the importer of prometheus-client.

The loop only replaces a snapshot, which takes no lock: a scrape that is slow, or comes a thousand
times a second, holds up no step. Whoever reaches the address can read the figures and nothing else,
so it is the loopback's unless the configuration says otherwise.
"""

import math
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from importlib import metadata
from typing import Any
from wsgiref.simple_server import WSGIServer

from pipeline.clip import StepReport
from pipeline.track.health import HealthWatch
from pipeline.track.metrics import PrometheusConfig

STATES = ("healthy", "watch", "collapsed")
_COUNTED = {
    "skip": "skipped_steps",
    "spike": "spikes",
    "save_failed": "failed_saves",
    "straggler": "stragglers",
    "fault": "errors",
}
_MISSING = (
    "prometheus-client is not installed, so track.prometheus serves nothing: "
    "pip install 'jepa-pipeline[train]'."
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Snapshot:
    """What a scrape sees: the newest step, the newest checkpoint, and counts of this process."""

    report: StepReport | None = None
    step_time: float = 0.0
    """When the newest step ended, unix seconds."""
    checkpoint_step: int | None = None
    checkpoint_time: float = 0.0
    """When it was published, or taken up by a resume, unix seconds."""
    bad_samples: int = 0
    counts: Mapping[str, int] = field(default_factory=lambda: dict.fromkeys(_COUNTED.values(), 0))
    health: Mapping[str, float] = field(default_factory=dict)
    """The newest measured collapse signals."""
    health_state: int = STATES.index("watch")


@dataclass(frozen=True, kw_only=True, slots=True)
class Figure:
    """One metric: its name without `jepa_`, what it is, and its values by label."""

    name: str
    help: str
    values: tuple[tuple[tuple[str, ...], float], ...]
    labels: tuple[str, ...] = ()
    is_counter: bool = False


class PrometheusEndpoint:
    """Serves a run's figures; no method waits for anybody.

    Args:
        config: Where to listen.
        run: Name of the run.
        num_steps: Steps of all stages.
    """

    def __init__(self, config: PrometheusConfig, *, run: str, num_steps: int) -> None:
        self._config, self.run, self._num_steps = config, run, num_steps
        self._health = HealthWatch()
        self._server: WSGIServer | None = None
        self._trouble: str | None = None
        self._is_closed = False
        self.snapshot = Snapshot()

    def start(self) -> None:
        """Begins to serve, from a thread: looking up this machine's name may take seconds."""
        threading.Thread(target=self._serve, name="prometheus", daemon=True).start()

    def take_trouble(self) -> str | None:
        """Why nothing is served, once."""
        trouble, self._trouble = self._trouble, None
        return trouble

    def log(self, report: StepReport) -> None:
        """A step has ended."""
        now = self.snapshot
        self._health.watch(report)
        self.snapshot = replace(
            now,
            report=report,
            step_time=time.time(),
            bad_samples=now.bad_samples + report.num_faults,
            health=report.health or now.health,
            health_state=STATES.index(self._health.state),
        )

    def event(self, name: str, fields: Mapping[str, Any]) -> None:
        """Something happened, under the names of events.jsonl."""
        now = self.snapshot
        # A resumed run that never saves must look old, too: its age counts from the resume.
        if name in ("save", "resume") and fields.get("step") is not None:
            step = int(fields["step"])
            self.snapshot = replace(now, checkpoint_step=step, checkpoint_time=time.time())
        elif name in _COUNTED:
            key = _COUNTED[name]
            self.snapshot = replace(now, counts={**now.counts, key: now.counts[key] + 1})

    def close(self) -> None:
        """Ends it; requests that are being answered are not waited for."""
        self._is_closed = True
        server, self._server = self._server, None
        if server is not None:
            threading.Thread(target=_shut, args=(server,), daemon=True).start()

    @property
    def port(self) -> int | None:
        """Where it listens; None while it does not."""
        return None if self._server is None else self._server.server_port

    def figures(self) -> Iterator[Figure]:
        """Everything that a scrape tells."""
        now = self.snapshot
        version = metadata.version("jepa-pipeline")
        yield _one("run_info", "The run.", 1.0, version=version)
        yield _one("steps_planned", "Optimiser steps of all stages.", self._num_steps)
        yield from _of_checkpoint(now)
        yield from _of_counts(now)
        yield _one(
            "health_state", "0 healthy, 1 to be watched, 2 collapsed.", float(now.health_state)
        )
        signals = tuple(((name,), value) for name, value in sorted(now.health.items()))
        help_text = "Collapse signals, as last measured."
        yield Figure(name="health", help=help_text, values=signals, labels=("signal",))
        if now.report is not None:
            yield from _of_step(now.report, now.step_time)

    def _serve(self) -> None:
        try:
            from prometheus_client import CollectorRegistry, start_http_server  # noqa: PLC0415
        except ImportError:
            self._trouble = _MISSING
            return
        registry = CollectorRegistry(auto_describe=False)
        registry.register(_Collector(self))
        host, port = self._config.host, self._config.port
        try:
            self._server, _ = start_http_server(port, addr=host, registry=registry)
        except (OSError, OverflowError) as error:
            self._trouble = (
                f"track.prometheus cannot listen at {host}:{port} ({error}); the run goes on "
                "without it."
            )
            return
        if self._is_closed:
            self.close()


class _Collector:
    """Puts figures into the form that prometheus-client writes."""

    def __init__(self, endpoint: PrometheusEndpoint) -> None:
        self._endpoint = endpoint

    def collect(self) -> Iterator[Any]:
        from prometheus_client.core import (  # noqa: PLC0415
            CounterMetricFamily,
            GaugeMetricFamily,
        )

        for figure in self._endpoint.figures():
            kind = CounterMetricFamily if figure.is_counter else GaugeMetricFamily
            # The run's name on everything: one board shows many runs.
            family = kind(f"jepa_{figure.name}", figure.help, labels=("run", *figure.labels))
            for labels, value in figure.values:
                family.add_metric([self._endpoint.run, *labels], value)
            yield family


def _of_checkpoint(now: Snapshot) -> Iterator[Figure]:
    if now.checkpoint_step is None:
        return
    yield _one("checkpoint_step", "Step of the newest checkpoint.", now.checkpoint_step)
    age = max(0.0, time.time() - now.checkpoint_time)
    help_text = "Since the newest checkpoint was published, or taken up by this start."
    yield _one("checkpoint_age_seconds", help_text, age)


def _of_counts(now: Snapshot) -> Iterator[Figure]:
    yield Figure(
        name="bad_samples",
        help="Samples that had to be replaced since this start, all ranks together.",
        values=(((), float(now.bad_samples)),),
        is_counter=True,
    )
    for name, count in now.counts.items():
        words = name.replace("_", " ")
        yield Figure(
            name=name,
            help=f"{words[0].upper()}{words[1:]} since this start.",
            values=(((), float(count)),),
            is_counter=True,
        )


def _of_step(report: StepReport, when: float) -> Iterator[Figure]:
    seconds = max(report.step_seconds, 1e-9)
    wait = min(1.0, report.data_wait_seconds / seconds)
    yield _one("step", "The newest optimiser step.", report.step)
    yield _one("step_timestamp_seconds", "When it ended, unix seconds.", when)
    yield _one("stage", "The stage that it belongs to.", report.stage, stage=report.stage_name)
    yield _one("loss", "Loss of the newest step.", report.loss)
    terms = tuple(((name,), value) for name, value in sorted(report.terms.items()))
    yield Figure(name="loss_term", help="Its terms.", values=terms, labels=("term",))
    yield _one("learning_rate", "Learning rate of the newest step.", report.learning_rate)
    yield _one("gradient_norm", "Gradient norm of the newest step.", report.gradient_norm)
    yield _one("step_seconds", "What the newest step took.", report.step_seconds)
    yield _one("data_wait_seconds", "Of it waiting for the loader.", report.data_wait_seconds)
    yield _one("data_wait_share", "The same as a share of the step.", wait)
    yield _one("clips_per_second", "Clips of the global batch.", report.clips / seconds)
    yield _one("tokens_per_second", "Tokens before masking.", report.tokens / seconds)
    mfu = math.nan if report.mfu is None else report.mfu
    yield _one("mfu", "Model FLOPs over the peak of all devices; NaN without a known peak.", mfu)
    peak = report.peak_memory_gib * 2**30
    yield _one("peak_memory_bytes", "Largest use of a device's memory.", peak)


def _one(name: str, help_text: str, value: float, **labels: str) -> Figure:
    return Figure(
        name=name,
        help=help_text,
        values=((tuple(labels.values()), float(value)),),
        labels=tuple(labels),
    )


def _shut(server: WSGIServer) -> None:
    server.shutdown()
    server.server_close()
