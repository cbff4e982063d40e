"""`jepa status` and `jepa stop`."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipeline.commands import JsonFlag, print_json
from pipeline.errors import StorageError, UsageError
from pipeline.report.facts import RunFacts, gather
from pipeline.report.head import state_sentence
from pipeline.report.html import duration, moment, percent
from pipeline.report.probes import Comparison, compare, learning_sentence
from pipeline.stages import place_of_step
from pipeline.track.folder import MLFLOW_FILE, STOP_FILE, read_json_object

_ERRORS = ("fault", "save_failed")
_MOST_ERRORS = 3
_COLOURS = {
    "running": "green", "finished": "green", "starting": "cyan", "stopping": "yellow",
    "stopped": "yellow", "silent": "red", "failed": "red", "not started": "yellow",
    "healthy": "green", "watch": "yellow", "collapsed": "red",
}  # fmt: skip


def status(run: Path, *, json: JsonFlag = False) -> None:
    """Where a run stands: state, step, speed, time left, last checkpoint, errors, health, probes.

    Reads the run's folder alone, so it works on a run that goes on elsewhere as well as on a dead
    one.

    Args:
        run: Folder of the run.
        json: Print everything as JSON.
    """
    facts = gather(run)
    if json:
        print_json(summary(facts))
        return
    console = Console(highlight=False)
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column()
    for name, words in _lines(facts):
        grid.add_row(name, words)
    console.print(grid)


def stop(run: Path, *, json: JsonFlag = False) -> None:
    """Ask a run to save and stop after the step it is in.

    Writes a file that the run looks for at every step, so it works from any machine that sees the
    run's folder. The run can be continued with `jepa resume`.

    Args:
        run: Folder of the run.
        json: Print the result as JSON.
    """
    facts = gather(run)
    if facts.state in ("finished", "stopped", "failed", "not started", "starting"):
        raise UsageError(
            f"{run} cannot be stopped now. {state_sentence(facts)}",
            remedy=f"`jepa status {run}` says how it stands.",
        )
    path = run / STOP_FILE
    try:
        path.write_text(f"asked for at {datetime.now(UTC).isoformat(timespec='seconds')}\n")
    except OSError as error:
        raise StorageError(f"Cannot write {path}: {error}") from error
    if json:
        print_json({"run": str(run), "stop_file": str(path), "state": facts.state})
        return
    Console(highlight=False).print(_what_will_happen(facts), markup=False, soft_wrap=True)


def summary(facts: RunFacts) -> dict[str, Any]:
    """What `jepa status` knows, as plain data."""
    rates = facts.rates
    return {
        "run": str(facts.run_dir),
        "state": facts.state,
        "reason": facts.reason or None,
        "summary": state_sentence(facts),
        "step": facts.last_step,
        "num_steps": facts.num_steps,
        "stage": _stage(facts),
        "last_sign": facts.last_sign,
        "clips_per_second": rates.clips_per_second if rates else None,
        "step_seconds": rates.step_seconds if rates else None,
        "wait_share": rates.wait_share if rates else None,
        "mfu": rates.mfu if rates else None,
        "eta_seconds": facts.eta_seconds,
        "loss": facts.steps[-1].report.loss if facts.steps else None,
        "checkpoints": list(facts.commits),
        "num_starts": len(facts.ledger.attempts) if facts.ledger else 0,
        "effective_share": facts.ledger.effective_share if facts.ledger else None,
        "num_faults": len(facts.faults),
        "errors": _errors(facts),
        "health": facts.health.state,
        "health_sentences": list(facts.health.sentences),
        "probes": [_probe(comparison) for comparison in compare(facts.probes)],
        "mlflow": _mlflow(facts),
        "config_problem": facts.config_problem,
    }


def _lines(facts: RunFacts) -> list[tuple[str, Text]]:
    lines = [
        ("run", Text(str(facts.run_dir))),
        ("state", _coloured(facts.state, state_sentence(facts))),
        ("stage", Text(_stage(facts) or "–")),
        ("speed", Text(_speed(facts))),
        ("checkpoint", Text(_checkpoint(facts))),
        ("starts", Text(_starts(facts))),
        ("health", _coloured(facts.health.state, " ".join(facts.health.sentences))),
        ("probes", Text(learning_sentence(compare(facts.probes)))),
    ]
    if facts.faults:
        last = facts.faults[-1]
        told = f"{len(facts.faults)} left out; the last, {last.get('key')}: {last.get('reason')}"
        lines.append(("samples", Text(told)))
    lines += [("error", Text(f"{e['when']}: {e['message']}", style="red")) for e in _errors(facts)]
    mlflow = _mlflow(facts)
    if mlflow is not None and mlflow["state"] == "down":
        lines.append(("mlflow", Text(f"does not answer: {mlflow['error']}", style="yellow")))
    if facts.config_problem:
        lines.append(("config", Text(facts.config_problem, style="yellow")))
    return lines


def _coloured(word: str, sentence: str) -> Text:
    return Text.assemble((f"{word}  ", _COLOURS[word]), sentence)


def _stage(facts: RunFacts) -> str | None:
    config = facts.config
    if config is None or not config.num_steps:
        return None
    place = place_of_step(config.stages, min(max(facts.last_step, 1), config.num_steps))
    stage = place.stage
    return (
        f"{stage.name}, {place.index + 1} of {len(config.stages)}: step {place.step_in_stage} of "
        f"{stage.steps}, {stage.frames} frames at {stage.resolution} px"
    )


def _speed(facts: RunFacts) -> str:
    rates = facts.rates
    if rates is None:
        return "–"
    mfu = f", {percent(rates.mfu)} of the stated peak" if rates.mfu is not None else ""
    return (
        f"{rates.clips_per_second:.1f} clips/s, {duration(rates.step_seconds)} a step, "
        f"{percent(rates.wait_share)} of it waiting for data{mfu}"
    )


def _checkpoint(facts: RunFacts) -> str:
    if not facts.commits:
        return "none yet"
    since = facts.last_step - facts.commits[-1]
    ago = f", {since} steps ago" if since > 0 else ""
    return f"step {facts.commits[-1]}{ago}; {len(facts.commits)} kept"


def _starts(facts: RunFacts) -> str:
    ledger = facts.ledger
    if ledger is None:
        return "–"
    before = f"; before that: {ledger.attempts[-2].ending}" if len(ledger.attempts) > 1 else ""
    share = percent(ledger.effective_share, 0)
    return f"{len(ledger.attempts)}; {share} of the time since the first went into steps{before}"


def _errors(facts: RunFacts) -> list[dict[str, Any]]:
    """The newest errors, newest last."""
    found = [event for event in facts.events if event.name in _ERRORS]
    return [
        {
            "event": event.name,
            "when": moment(event.time),
            "step": event.step,
            "message": str(event.details.get("reason", event.name)),
        }
        for event in found[-_MOST_ERRORS:]
    ]


def _probe(comparison: Comparison) -> dict[str, Any]:
    return {
        "task": comparison.task,
        "head": comparison.head,
        "chance": comparison.chance,
        "untrained_top1": comparison.untrained.top1 if comparison.untrained else None,
        "step": comparison.newest.step if comparison.newest else None,
        "top1": comparison.newest.top1 if comparison.newest else None,
    }


def _mlflow(facts: RunFacts) -> dict[str, Any] | None:
    found = read_json_object(facts.run_dir / MLFLOW_FILE)
    keys = ("tracking_uri", "run_id", "state", "error")
    return {key: found.get(key) for key in keys} if found else None


def _what_will_happen(facts: RunFacts) -> str:
    if facts.state == "silent":
        return (
            f"The stop file is written, but there has been no sign of life since "
            f"{moment(facts.last_sign)}: nothing may be there to obey it."
        )
    rates = facts.rates
    wait = f" (a step takes {duration(rates.step_seconds)})" if rates else ""
    return (
        f"Asked. The run finishes the step it is in{wait}, saves a checkpoint and ends with exit "
        f"code 75. `jepa resume {facts.run_dir}` continues it."
    )
