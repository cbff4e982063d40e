"""The classes: pairs of actions of which one is the other played backwards.

The wording is this project's own. A template keeps the placeholder convention of
Something-Something: every `[something]` stands for one of the objects that act.
"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    """Two classes that differ in the direction of time and in nothing else."""

    motion: str
    """Name of the motion in `motions.py` that draws the forward action."""
    forward: str
    """Template of the motion as it is drawn."""
    backward: str
    """Template of the same motion played backwards."""


PAIRS: tuple[Pair, ...] = (
    Pair(
        motion="slide",
        forward="sliding [something] across to the right",
        backward="sliding [something] across to the left",
    ),
    Pair(
        motion="rise",
        forward="hoisting [something] up high",
        backward="letting [something] sink to the ground",
    ),
    Pair(
        motion="approach",
        forward="bringing [something] up to the lens",
        backward="sending [something] off into the distance",
    ),
    Pair(
        motion="cover",
        forward="hiding [something] under [something]",
        backward="uncovering [something] by taking [something] away",
    ),
    Pair(
        motion="spin",
        forward="spinning [something] clockwise",
        backward="spinning [something] anticlockwise",
    ),
    Pair(
        motion="spread",
        forward="parting [something] and [something]",
        backward="bringing [something] and [something] together",
    ),
    Pair(
        motion="swing",
        forward="swinging [something] open on top of [something]",
        backward="swinging [something] shut on top of [something]",
    ),
    Pair(
        motion="topple",
        forward="toppling [something] onto its side",
        backward="standing [something] back on its end",
    ),
    Pair(
        motion="slip",
        forward="slipping [something] out of sight behind [something]",
        backward="fetching [something] from behind [something]",
    ),
    Pair(
        motion="squash",
        forward="squashing [something] flat",
        backward="letting [something] swell to its full height",
    ),
)
"""All pairs; a data set uses the first N of them."""


def bare(template: str) -> str:
    """The key of a template in `labels.json`: the same words without any bracket."""
    return template.replace("[", "").replace("]", "")


def class_numbers(num_pairs: int) -> dict[str, int]:
    """Bare template → class number, alphabetical, as the official label file has it."""
    names = sorted(
        bare(template) for pair in PAIRS[:num_pairs] for template in (pair.forward, pair.backward)
    )
    return {name: number for number, name in enumerate(names)}


def fill(template: str, placeholders: tuple[str, ...]) -> str:
    """The sentence of one video: each `[something]` replaced by an object's name, in order."""
    sentence = template
    for placeholder in placeholders:
        sentence = sentence.replace("[something]", placeholder, 1)
    return sentence
