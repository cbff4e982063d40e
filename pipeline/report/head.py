"""The top of the page: what the run is, how it stands, and whether it is healthy."""

from pipeline.report.facts import RunFacts
from pipeline.report.html import duration, moment, number, percent, text
from pipeline.report.probes import Comparison, learning_sentence

_MARKS = {"healthy": ("good", "✓"), "watch": ("warn", "!"), "collapsed": ("bad", "✕")}
_TITLES = {
    "healthy": "The features are healthy",
    "watch": "The features need watching",
    "collapsed": "The features have collapsed",
}


def head(facts: RunFacts, comparisons: list[Comparison]) -> str:
    """Name, state, verdict, and the figures most asked for."""
    verdict = facts.verdict
    kind, mark = _MARKS[verdict.state]
    reasons = "".join(f"<li>{text(sentence)}</li>" for sentence in verdict.sentences)
    learned = text(learning_sentence(comparisons))
    return (
        f"<p class=eyebrow>Training run</p><h1>{text(facts.run_dir.resolve().name)}</h1>"
        f"<p>{text(state_sentence(facts))}</p>"
        f'<div class="verdict {kind}"><strong>{mark} {_title(facts)}</strong>'
        f"<ul>{reasons}<li>{learned}</li></ul><p><b>{text(verdict.keep.sentence)}</b> "
        f"{text(verdict.todo)}</p></div>{_tiles(facts, comparisons)}"
    )


def _title(facts: RunFacts) -> str:
    if facts.verdict.state == facts.health.state:
        return _TITLES[facts.health.state]
    return f"{_TITLES[facts.health.state]}, but there is something to look at"


def state_sentence(facts: RunFacts) -> str:
    """How the run stands, how it came there, and what can be done about it."""
    of_all = f" of {facts.num_steps}" if facts.num_steps else ""
    place = f"step {facts.last_step}{of_all}"
    resume = f"`jepa resume {facts.run_dir}` continues it"
    killed = "its process is no more" if facts.is_abandoned else "it was killed or hangs"
    reason = f": {facts.reason.rstrip('.')}" if facts.reason else ""
    sentences = {
        "not started": "Nothing has been recorded yet.",
        "starting": f"Starting, from {place}: its processes are loading.",
        "running": f"Running, at {place}; {_time_left(facts)}.",
        "stopping": f"Asked to stop, at {place}: it will save and end.",
        "finished": f"Finished at {place}{reason}.",
        "stopped": f"Stopped at {place}{reason}; {resume}.",
        "failed": f"Failed at {place}{reason}; when the cause is mended, {resume}.",
        "silent": f"No sign of life since {moment(facts.last_sign)}, at {place}: {killed}; "
        f"{resume}.",
    }
    return f"{sentences[facts.state]}{_origin(facts)}{_resumes(facts)}"


def _origin(facts: RunFacts) -> str:
    origin = facts.info.get("init_from")
    if not origin:
        return ""
    fresh = f"; untrained at first: {', '.join(origin['fresh'])}" if origin.get("fresh") else ""
    teacher = origin.get("teacher", "not told")
    return f" It started from the weights of {origin['source']}, its teacher {teacher}{fresh}."


def _time_left(facts: RunFacts) -> str:
    left = facts.eta_seconds
    return "time left is not known yet" if left is None else f"about {duration(left)} left"


def _resumes(facts: RunFacts) -> str:
    count = sum(event.name == "resume" for event in facts.events)
    if count == 0:
        return ""
    return " It was resumed once." if count == 1 else f" It was resumed {count} times."


def _tiles(facts: RunFacts, comparisons: list[Comparison]) -> str:
    clips = sum(step.report.clips for step in facts.steps)
    tokens = sum(step.report.tokens for step in facts.steps)
    tiles = [
        (number(facts.last_step), "steps taken"),
        (number(clips), "clips seen"),
        (number(tokens), "tokens seen"),
    ]
    if facts.ledger is not None:
        tiles.append((duration(facts.ledger.wall_seconds), "from start to last sign"))
        tiles.append((percent(facts.ledger.effective_share, 0), "of that spent computing"))
    rates = facts.rates
    if rates is not None:
        tiles.append((number(rates.clips_per_second), "clips per second lately"))
        tiles.append((percent(rates.wait_share), "of steps waiting for data"))
        if rates.mfu is not None:
            tiles.append((percent(rates.mfu), "of the stated peak FLOP/s"))
    gains = [c.gain for c in comparisons if c.gain is not None]
    if gains:
        tiles.append((f"{100 * max(gains):+.1f}", "points over untrained, best probe"))
    return (
        "<div class=tiles>"
        + "".join(
            f"<div class=tile><b>{text(value)}</b><span>{text(label)}</span></div>"
            for value, label in tiles
        )
        + "</div>"
    )
