"""What a sample carries beside its pictures: captions, robot states, actions."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from pipeline.data.badmedia import BadMediaError, BadReason
from pipeline.data.format import Caption, IndexRecord, Member, ShardIndex

Companion = Literal["captions", "states", "actions"]

# As the decoder's: a row recorded at a frame's own time belongs to that frame.
_TIME_TOLERANCE_SECONDS = 1e-6


@dataclass(frozen=True, kw_only=True, slots=True)
class Companions:
    """Cut to one clip; None where the run does not ask for it or the sample has no caption."""

    text: str | None = None
    states_TS: Tensor | None = None
    actions_TA: Tensor | None = None


def read_companions(
    dataset: ShardIndex, record: IndexRecord, times_T: np.ndarray, wanted: Collection[Companion]
) -> Companions:
    """Read what a run asks for and cut it to a clip.

    Args:
        dataset: The sample's dataset.
        record: The sample's row of the index.
        times_T: Presentation times of the clip's frames in seconds, ascending.
        wanted: What to read.

    Returns:
        The caption that covers most of the clip; float32 states at each frame [T, S]; float32
        actions that follow each frame but the last [T - 1, A].

    Raises:
        BadMediaError: States or actions are missing or damaged, or a caption is damaged.
    """
    text = states = actions = None
    if "captions" in wanted and record.place(Member.CAPTIONS).length > 0:
        text = main_caption(dataset.read_captions(record), times_T[0], times_T[-1])
    if "states" in wanted:
        states = _rows(dataset, record, Member.STATES, times_T)
    if "actions" in wanted:
        actions = _rows(dataset, record, Member.ACTIONS, times_T[:-1])
    return Companions(text=text, states_TS=states, actions_TA=actions)


def main_caption(captions: Sequence[Caption], start: float, end: float) -> str | None:
    """The text of the caption that covers most of [start, end] seconds; the first of equals."""
    best_text, best_seconds = None, 0.0
    for caption in captions:
        seconds = min(caption.t1, end) - max(caption.t0, start)
        if seconds > best_seconds:
            best_text, best_seconds = caption.text, seconds
    return best_text


def _rows(dataset: ShardIndex, record: IndexRecord, member: Member, times_T: np.ndarray) -> Tensor:
    """The row in force at each time: the last one recorded at or before it."""
    rows = dataset.read_array(record, member)
    if record.place(Member.TIMES).length > 0:
        recorded = dataset.read_array(record, Member.TIMES)
        # Actions lie between states, so there is one less than times.
        if len(recorded) not in (len(rows), len(rows) + 1):
            raise BadMediaError(
                BadReason.DAMAGED, f"{member} has {len(rows)} rows for {len(recorded)} times"
            )
        numbers = np.searchsorted(recorded, times_T + _TIME_TOLERANCE_SECONDS, side="right") - 1
    else:
        numbers = np.floor((times_T + _TIME_TOLERANCE_SECONDS) * record.fps).astype(np.int64)
    if len(rows) == 0:
        raise BadMediaError(BadReason.DAMAGED, f"{member} has no rows")
    return torch.from_numpy(rows[np.clip(numbers, 0, len(rows) - 1)])
