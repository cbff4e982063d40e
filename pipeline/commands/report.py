"""`jepa report`: a run as one HTML page, written or served."""

import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from rich.console import Console

from pipeline.commands import JsonFlag, print_json, print_text
from pipeline.errors import JepaError, UsageError
from pipeline.report.facts import RunFacts, State, check_is_run, gather
from pipeline.report.features import FeatureMapRow
from pipeline.report.head import state_sentence
from pipeline.report.page import write_report
from pipeline.report.probes import compare, learning_sentence
from pipeline.report.serve import is_loopback, serve_report
from pipeline.track.folder import MLFLOW_FILE
from pipeline.track.metrics import RunStatus
from pipeline.track.mlflow_sink import MlflowSink

_MOST_CLIPS = 16
_ENDED: dict[State, RunStatus] = {
    "finished": "finished",
    "stopped": "stopped",
    "failed": "failed",
    "silent": "failed",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class MapOptions:
    """Pictures of what encoders see."""

    feature_maps: bool = True
    """Draw what the first and the newest encoder see in a few clips."""
    clips: int = 3
    """How many clips to draw feature maps of."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LiveOptions:
    """The report as a live page."""

    serve: Annotated[bool, Parameter(negative="")] = False
    """Show the report in a browser and follow the run, until Ctrl-C, instead of writing a file."""
    port: int = 7007
    """Port of the live page; 0 takes a free one."""
    host: str = "127.0.0.1"
    """Address of the live page; with any other than the default, other machines can read the run's
    configuration and figures, without a password."""
    every_seconds: float = 5.0
    """The live page is drawn again at most so often."""


def report(
    run: Path,
    *,
    out: Path | None = None,
    maps: Annotated[MapOptions | None, Parameter(name="*")] = None,
    live: Annotated[LiveOptions | None, Parameter(name="*")] = None,
    upload: bool = True,
    json: JsonFlag = False,
) -> None:
    """Write a run's report: health, curves, stages, speed, probes, feature maps, time.

    Works while the run goes on, too. A page without feature maps needs neither the checkpoints nor
    the data. With --serve the page is shown on this machine and follows the run.

    Args:
        run: Folder of the run.
        out: File to write; report.html in the run's folder by default.
        maps: Pictures of what encoders see.
        live: The report as a live page.
        upload: Give the report, and what it has not got yet, to the run's MLflow if the run has
            ended.
        json: Print the result as JSON.
    """
    asked = maps or MapOptions()
    if not 1 <= asked.clips <= _MOST_CLIPS:
        raise UsageError(f"expected --clips between 1 and {_MOST_CLIPS}, got {asked.clips}")
    console = Console(stderr=True)
    if live is not None and live.serve:
        _serve(run, live, out, console)
        return
    facts = gather(run)
    sink = _sink(facts) if upload else None
    rows, problem = _feature_maps(facts, asked.clips, console) if asked.feature_maps else (None, "")
    path = write_report(run, feature_maps=rows, out=out, left_out=problem)
    uploaded = _upload(sink, facts, path, console)
    if json:
        print_json(_result(facts, path, problem, uploaded=uploaded))
    else:
        print_text(str(path))


def _serve(run: Path, live: LiveOptions, out: Path | None, console: Console) -> None:
    if out is not None:
        raise UsageError("expected --serve or --out, got both: a live page is no file")
    if not 0 <= live.port <= 65535 or live.every_seconds <= 0:
        raise UsageError(
            f"expected --port from 0 to 65535 and --every-seconds above 0, got {live.port} and "
            f"{live.every_seconds:g}"
        )
    check_is_run(run)
    if not is_loopback(live.host):
        console.print(
            f"Whoever reaches {live.host}:{live.port} can read this run: there is no password.",
            style="yellow",
        )

    def tell(address: str) -> None:
        print_text(address)
        sys.stdout.flush()
        console.print("Ctrl-C ends it.")

    serve_report(run, host=live.host, port=live.port, every_seconds=live.every_seconds, tell=tell)


def _feature_maps(
    facts: RunFacts, num_clips: int, console: Console
) -> tuple[list[FeatureMapRow] | None, str]:
    """The rows, or why there are none: a report without pictures is better than no report."""
    if facts.config is None:
        return None, f"{facts.config_problem}."
    # Networks and decoders, which a report without pictures does not need.
    from pipeline.report.encoders import draw_feature_maps  # noqa: PLC0415

    try:
        with console.status("drawing feature maps"):
            return draw_feature_maps(facts.run_dir, facts.config, num_clips=num_clips), ""
    except JepaError as error:
        console.print(f"Feature maps are left out: {error}", markup=False, soft_wrap=True)
        return None, str(error)


def _sink(facts: RunFacts) -> MlflowSink | None:
    """Starts the upload early: importing MLflow takes as long as drawing the page."""
    tracked = facts.config is not None and facts.config.track.mlflow.enabled
    was_sent = (facts.run_dir / MLFLOW_FILE).exists()
    if facts.config is None or not tracked or not was_sent or facts.state not in _ENDED:
        return None
    sink = MlflowSink(facts.config.track, facts.run_dir, is_training=False)
    return sink if sink.start() is None else None


def _upload(sink: MlflowSink | None, facts: RunFacts, path: Path, console: Console) -> bool:
    if sink is None:
        return False
    sink.artifact(path)
    with console.status("sending the report to MLflow"):
        warning = sink.close(_ENDED[facts.state], is_urgent=False)
    if warning is not None:
        console.print(warning, markup=False, soft_wrap=True)
    return warning is None


def _result(facts: RunFacts, path: Path, problem: str, *, uploaded: bool) -> dict[str, object]:
    return {
        "report": str(path),
        "state": facts.state,
        "summary": state_sentence(facts),
        "health": facts.health.state,
        "health_sentences": list(facts.health.sentences),
        "verdict": asdict(facts.verdict),
        "learned": learning_sentence(compare(facts.probes)),
        "feature_maps_left_out": problem or None,
        "uploaded": uploaded,
    }
