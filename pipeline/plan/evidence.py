"""How far the cost model was from what others published: tests reckon these figures anew.

A user sees them under every table of the model. An error that is not told is not an estimate.
"""

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Evidence:
    """One published figure beside the model's own, with the shipped cluster files as they are."""

    what: str
    published: float
    predicted: float
    source: str
    why: str
    """What the difference is put down to."""

    @property
    def error(self) -> float:
        """Predicted over published, less one."""
        return self.predicted / self.published - 1.0


PAPER_HOURS = Evidence(
    what="A100-hours of ViT-g to 64 frames of 384 pixels",
    published=63_000.0,
    predicted=43_800.0,
    source="V-JEPA 2, arXiv 2506.09985: 60 GPU-years at full size, 8.4 times the schedule's; "
    "their quotient is derived",
    why="the reference encodes every mask by itself, computes angles in every layer and sums whole "
    "gradients",
)
PAPER_SAVING = Evidence(
    what="saving of its schedule over full size throughout",
    published=8.4,
    predicted=11.0,
    source="V-JEPA 2, arXiv 2506.09985, figure and text",
    why="the model counts FLOPs; work that grows with tokens alone, and loading, weigh more on "
    "short clips",
)
H100_NODES = Evidence(
    what="ViT-g from 1 to 16 H100 nodes, efficiency",
    published=0.944,
    predicted=0.99,
    source="NVIDIA NeMo, ViT performance page",
    why="the model knows no slow rank and no busy switch",
)
ALL = (PAPER_HOURS, PAPER_SAVING, H100_NODES)
USUAL_UTILISATION = 0.3
UTILISATIONS = (
    "V-JEPA 2's A100-hours come to 21% (derived), another trainer's ViT-g to 29% of H100s and 45% "
    "of A100s"
)
"""Model FLOPs over the peak of what was published: the paper's by its GPU-hours and our count of
its FLOPs, the other trainer's as its page states it."""


def assumptions(efficiency: float, overlap: float) -> Iterator[str]:
    """What the model takes for granted, and by how much it was wrong, for a person."""
    told = "; ".join(
        f"{one.what} {_number(one.predicted)} for {_number(one.published)} ({one.error:+.0%})"
        for one in ALL
    )
    yield (
        f"Reckoned, not measured: a GPU computes at {efficiency:.0%} of its peak at best and hides "
        f"{overlap:.0%} of its communication. Beside published figures: {told}. Put what `jepa "
        "bench step` and `jepa check` measure into the file of --cluster."
    )


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:g}"
