"""What a run decided for itself at its start or on its way, and why: from its events."""

from collections.abc import Callable

from pipeline.report.facts import RunFacts
from pipeline.report.html import duration, section, table
from pipeline.track.metrics import Event

_Row = tuple[str, str, str, object]


def choices_section(facts: RunFacts) -> str:
    """A table of choices, the newest of each kind; empty if nothing was left to the run."""
    newest: dict[tuple[str, str], _Row] = {}
    for event in facts.events:
        describe = _KINDS.get(event.name)
        if describe is not None:
            what, chosen, why = describe(event)
            step = "–" if event.step is None else event.step
            newest[event.name, what] = (what, chosen, why, step)
    if not newest:
        return ""
    return section(
        "What the run chose",
        table(("what", "chosen", "why", "at step"), list(newest.values()), 3),
        lead="What the configuration left to be measured. The last choice of each kind.",
    )


def _save_interval(event: Event) -> tuple[str, str, str]:
    seconds = float(event.details.get("seconds_between", 0.0))
    return "time between saves", duration(seconds), str(event.details.get("reason", ""))


def _attention(event: Event) -> tuple[str, str, str]:
    took = event.details.get("milliseconds")
    timed = sorted(took.items(), key=lambda pair: pair[1]) if isinstance(took, dict) else []
    why = ", ".join(f"{kernel} {milliseconds:g} ms" for kernel, milliseconds in timed)
    return f"kernel for {event.details.get('calls')}", str(event.details.get("kernel")), why


def _recompute(event: Event) -> tuple[str, str, str]:
    told = {key: value for key, value in event.details.items() if key not in ("stage", "reason")}
    chosen = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in told.items())
    what = f"blocks computed again in {event.details.get('stage')}"
    return what, chosen, str(event.details.get("reason", ""))


def _peak(event: Event) -> tuple[str, str, str]:
    tflops = event.details.get("tflops")
    chosen = "unknown" if tflops is None else f"{float(tflops):.4g} TFLOP/s"
    return "peak that MFU refers to", chosen, str(event.details.get("source", ""))


_KINDS: dict[str, Callable[[Event], tuple[str, str, str]]] = {
    "save_interval": _save_interval,
    "attention": _attention,
    "recompute": _recompute,
    "peak": _peak,
}
