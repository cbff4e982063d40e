"""`jepa stop`."""

from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console

from pipeline.commands import JsonFlag, print_json
from pipeline.errors import StorageError, UsageError
from pipeline.report.facts import RunFacts, gather
from pipeline.report.head import state_sentence
from pipeline.report.html import duration, moment
from pipeline.track.folder import STOP_FILE
from pipeline.track.jobs import ALIVE, present_jobs


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
        jobs = [job for job in present_jobs(run) if job.record.kind == "train"]
        jobs = [job for job in jobs if job.state.state in ALIVE]
        raise UsageError(
            f"{run} cannot be stopped now. {state_sentence(facts)}",
            remedy=f"It waits for its job to start: `{jobs[-1].record.stop}` takes that back."
            if jobs
            else f"`jepa status {run}` says how it stands.",
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
