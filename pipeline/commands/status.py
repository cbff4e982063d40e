"""`jepa status`."""

import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from pipeline.checkpoint.layout import checkpoints_dir, commit_name
from pipeline.checkpoint.load import verify as verify_commit
from pipeline.commands import JsonFlag, print_json
from pipeline.conduct.retention import CONDUCT_FOLDER, is_owned
from pipeline.report.facts import RunFacts, gather
from pipeline.report.head import state_sentence
from pipeline.report.html import duration, moment, percent
from pipeline.report.probes import Comparison, compare, learning_sentence
from pipeline.stages import place_of_step
from pipeline.track.folder import MLFLOW_FILE, read_json_object
from pipeline.track.jobs import ALIVE, present_jobs
from pipeline.track.journal import journal_sentence, read_journal
from pipeline.track.lease import look
from pipeline.track.rewinds import read_rewinds

_ERRORS = ("fault", "save_failed", "upload_failed")
_ALARMS = ("health", "spike", "skip", "straggler", "rewind")
_MOST_ERRORS = 3
_WATCH_SECONDS = 2.0
_ENDED = ("finished", "stopped", "failed", "not started")
_COLOURS = {
    "running": "green", "finished": "green", "starting": "cyan", "stopping": "yellow",
    "stopped": "yellow", "silent": "red", "failed": "red", "not started": "yellow",
    "healthy": "green", "watch": "yellow", "collapsed": "red",
}  # fmt: skip


def status(run: Path, *, watch: bool = False, verify: bool = False, json: JsonFlag = False) -> None:
    """Where a run stands: state, step, speed, time left, last checkpoint, errors, health, probes.

    Reads the run's folder, so it works on a run that goes on elsewhere as well as on a dead one;
    and, where the scheduler's command is at hand, asks how the jobs stand that `jepa launch` made.

    Args:
        run: Folder of the run.
        watch: Show it again every two seconds until the run has ended.
        verify: Compare every byte of the newest checkpoint with its digest; without it, its files
            and their sizes.
        json: Print everything as JSON; with --watch one document after the other.
    """
    if json:
        _repeat(lambda: _print_once(run, verify=verify), run, watch=watch)
        return
    console = Console(highlight=False)
    if not watch:
        console.print(_grid(gather(run), verify=verify))
        return
    with Live(console=console, auto_refresh=False) as live:
        _repeat(
            lambda: live.update(_grid(gather(run), verify=verify), refresh=True), run, watch=True
        )


def summary(facts: RunFacts, *, every_byte: bool = False) -> dict[str, Any]:
    """What `jepa status` knows, as plain data."""
    rates = facts.rates
    good, bad = _good_checkpoint(facts, every_byte=every_byte)
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
        "last_good_checkpoint": good,
        "damaged_checkpoints": bad,
        "owner": _owner(facts),
        "jobs": [job.to_dict() for job in present_jobs(facts.run_dir)],
        "num_starts": len(facts.ledger.attempts) if facts.ledger else 0,
        "effective_share": facts.ledger.effective_share if facts.ledger else None,
        "phases": facts.ledger.phases if facts.ledger else None,
        "left_out_steps": _left_out(facts),
        "num_faults": len(facts.faults),
        "errors": _newest(facts, _ERRORS),
        "alarms": _newest(facts, _ALARMS),
        "health": facts.health.state,
        "health_sentences": list(facts.health.sentences),
        "health_evidence": [asdict(one) for one in facts.health.evidence],
        "verdict": asdict(facts.verdict),
        "probes": [_probe(comparison) for comparison in compare(facts.probes)],
        "mlflow": _mlflow(facts),
        "config_problem": facts.config_problem,
    }


def _print_once(run: Path, *, verify: bool) -> None:
    print_json(summary(gather(run), every_byte=verify))


def _repeat(show: Callable[[], None], run: Path, *, watch: bool) -> None:
    show()
    while watch and (gather(run).state not in _ENDED or _is_in_queue(run)):
        time.sleep(_WATCH_SECONDS)
        show()


def _is_in_queue(run: Path) -> bool:
    """Whether a scheduler still has a job of it, which may begin or go on."""
    return any(job.state.state in ALIVE for job in present_jobs(run))


def _grid(facts: RunFacts, *, verify: bool) -> Table:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column()
    for name, words in _lines(facts, every_byte=verify):
        grid.add_row(name, words)
    return grid


def _lines(facts: RunFacts, *, every_byte: bool) -> list[tuple[str, Text]]:
    lines = [
        ("run", Text(str(facts.run_dir))),
        ("state", _coloured(facts.state, state_sentence(facts))),
        ("stage", Text(_stage(facts) or "–")),
        ("speed", Text(_speed(facts))),
        ("checkpoint", _checkpoint(facts, every_byte=every_byte)),
        ("owner", Text(_owner(facts) or "nobody")),
        ("starts", Text(_starts(facts))),
        *(("job", Text(job.words)) for job in present_jobs(facts.run_dir)),
        ("time", Text(_phases(facts))),
        ("health", _coloured(facts.verdict.state, " ".join(facts.verdict.sentences))),
        ("advice", Text(f"{facts.verdict.todo} {facts.verdict.keep.sentence}")),
        ("probes", Text(learning_sentence(compare(facts.probes)))),
    ]
    is_alive = is_owned(facts.run_dir / CONDUCT_FOLDER)
    beside = journal_sentence(read_journal(facts.run_dir), is_alive=is_alive)
    if beside:
        lines.append(("conductor", Text(beside)))
    if facts.faults:
        last = facts.faults[-1]
        told = f"{len(facts.faults)} left out; the last, {last.get('key')}: {last.get('reason')}"
        lines.append(("samples", Text(told)))
    left_out = _left_out(facts)
    if left_out:
        lines.append(("left out", Text("steps " + ", ".join(f"{a} to {b}" for a, b in left_out))))
    for name, words, style in (("alarm", _ALARMS, "yellow"), ("error", _ERRORS, "red")):
        told = _newest(facts, words)
        lines += [(name, Text(f"{e['when']}: {e['message']}", style=style)) for e in told]
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


def _checkpoint(facts: RunFacts, *, every_byte: bool) -> Text:
    if not facts.commits:
        return Text("none yet")
    good, bad = _good_checkpoint(facts, every_byte=every_byte)
    told = Text("none is whole" if good is None else f"step {good}", "red" if good is None else "")
    since = facts.last_step - (good or 0)
    told.append(f", {since} step{'s' * (since != 1)} ago" if since > 0 and good is not None else "")
    checked = "every byte compared" if every_byte else "files and sizes compared"
    told.append(f"; {len(facts.commits)} kept; {checked}")
    for step, problem in bad.items():
        told.append(f"\nstep {step} is damaged: {problem}", "red")
    return told


def _good_checkpoint(facts: RunFacts, *, every_byte: bool) -> tuple[int | None, dict[int, str]]:
    """The newest checkpoint that is whole, and what is wrong with newer ones."""
    bad: dict[int, str] = {}
    for step in reversed(facts.commits):
        path = checkpoints_dir(facts.run_dir) / commit_name(step)
        problems = verify_commit(path, digests=every_byte)
        if not problems:
            return step, bad
        if path.is_dir():  # else it has just been pruned
            bad[step] = problems[0]
    return None, bad


def _owner(facts: RunFacts) -> str | None:
    held = look(facts.run_dir)
    if held is None or held.owner is None or held.owner.released:
        return None
    died = ", which is no more" if facts.is_abandoned else ""
    return f"{held.owner.words}{died}, last sign {duration(held.age_seconds)} ago"


def _left_out(facts: RunFacts) -> list[tuple[int, int]]:
    return [(one.first_step, one.last_step) for one in read_rewinds(facts.run_dir)]


def _phases(facts: RunFacts) -> str:
    ledger = facts.ledger
    if ledger is None or ledger.wall_seconds <= 0:
        return "–"
    parts = [
        f"{name} {percent(seconds / ledger.wall_seconds, 0)}"
        for name, seconds in ledger.phases.items()
    ]
    return f"{', '.join(parts)} of {duration(ledger.wall_seconds)}"


def _starts(facts: RunFacts) -> str:
    ledger = facts.ledger
    if ledger is None:
        return "–"
    before = f"; before that: {ledger.attempts[-2].ending}" if len(ledger.attempts) > 1 else ""
    share = percent(ledger.effective_share, 0)
    return f"{len(ledger.attempts)}; {share} of the time since the first went into steps{before}"


def _newest(facts: RunFacts, names: tuple[str, ...]) -> list[dict[str, Any]]:
    """The newest events of some names, newest last."""
    found = [event for event in facts.events if event.name in names]
    return [
        {
            "event": event.name,
            "when": moment(event.time),
            "step": event.step,
            "rank": event.details.get("rank"),
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
