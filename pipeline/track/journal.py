"""conduct.jsonl: what was done beside a run, to which checkpoint, and why.

One line per event: `begin`, `done`, `failed`, `given_up` of a job; `damaged` and `gone` of a
checkpoint; `removed` and `export_removed` with their reasons; `judged` and, when it changes,
`verdict`; `start` and `stop` of the conductor. A job is done once per checkpoint: `key` names the
job, the checkpoint's step and its manifest's digest, so that a step that was trained again counts
anew.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.track.jsonl import read_json_lines

JOURNAL_FILE = "conduct.jsonl"


@dataclass(frozen=True, kw_only=True, slots=True)
class JournalEntry:
    """A line of conduct.jsonl."""

    time: float
    event: str
    step: int | None
    key: str
    """Of the job; empty for what concerns no job."""
    details: Mapping[str, Any]
    """All other fields of the line."""


def read_journal(run_dir: Path) -> tuple[JournalEntry, ...]:
    """All entries in the order in which they were written; none without a conductor."""
    lines = read_json_lines(run_dir / JOURNAL_FILE)
    return tuple(
        JournalEntry(
            time=float(record["time"]),
            event=str(record["event"]),
            step=record.get("step"),
            key=str(record.get("key", "")),
            details={k: v for k, v in record.items() if k not in ("time", "event", "step", "key")},
        )
        for record in lines.records
        if "time" in record and "event" in record
    )


def teacher_distances(entries: tuple[JournalEntry, ...]) -> dict[int, float]:
    """|teacher − student| / |student| of the encoder's weights by step, as verifying found it."""
    found = {}
    for entry in entries:
        value = entry.details.get("teacher_distance")
        if entry.step is not None and isinstance(value, int | float):
            found[entry.step] = float(value)
    return dict(sorted(found.items()))


def damaged_steps(entries: tuple[JournalEntry, ...]) -> dict[int, str]:
    """What is wrong with checkpoints that did not verify, by step; later good news counts."""
    found: dict[int, str] = {}
    for entry in entries:
        if entry.step is None:
            continue
        if entry.event == "damaged":
            found[entry.step] = str(entry.details.get("reason", ""))
        elif entry.event == "done":
            found.pop(entry.step, None)
    return found


def is_untold(entries: tuple[JournalEntry, ...]) -> bool:
    """Whether anything was found out that a conductor did not live to tell the report."""
    known = [int(e.details.get("lines", 0)) for e in entries if e.event == "judged"]
    news = ("done", "damaged", "given_up")
    return any(entry.event in news for entry in entries[max(known, default=0) :])


def journal_sentence(entries: tuple[JournalEntry, ...], *, is_alive: bool) -> str:
    """What a journal comes to, in words; empty without a conductor.

    Args:
        entries: All of them.
        is_alive: Whether a conductor follows the run now.
    """
    if not entries:
        return ""
    done = sum(entry.event == "done" for entry in entries)
    last = entries[-1]
    why = f"ended: {last.details.get('reason')}" if last.event == "stop" else "was killed"
    parts = [f"{done} jobs done; {'at work' if is_alive else why}"]
    finished = {entry.key for entry in entries if entry.event == "done"}
    lost = {e.key: e for e in entries if e.event == "given_up" and e.key not in finished}
    parts += [f"given up: {e.details.get('job')}: {e.details.get('reason')}" for e in lost.values()]
    return "; ".join(parts)
