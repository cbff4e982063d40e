"""The steps that a micro-batch goes through in a worker, from its plan to its tensors.

Members are read by offset and parsed by their own formats' readers; webdataset's automatic
decoding, which would unpickle what a tar says is a pickle, has no part in it.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import torch
from torch.utils.data import IterableDataset
from webdataset import filters
from webdataset.pipeline import DataPipeline

from pipeline.clip import Clip, ClipBatch, MicroBatchPlan
from pipeline.data.blocks import BlockPlace, Sent, SharedMemory
from pipeline.data.clips import LoadClip
from pipeline.data.settings import DataConfig, Source
from pipeline.data.worker import with_deadline
from pipeline.errors import JepaError

__all__ = ["Collate", "DataConfig", "Plans", "Source", "micro_batches"]

Collate = Callable[[Sequence[Clip], MicroBatchPlan], ClipBatch]
Plans = Iterable[MicroBatchPlan] | Callable[[], Iterable[MicroBatchPlan]]


def micro_batches(
    plans: Plans, load_clip: LoadClip, collate: Collate, memory: SharedMemory, skip: int = 0
) -> IterableDataset[Sent | JepaError]:
    """The pipeline of one worker, top to bottom; it can be pickled as long as its parts can.

    Args:
        plans: All plans of a rank.
        load_clip: Makes one clip.
        collate: Makes a micro-batch of clips.
        memory: What is shared with the training process.
        skip: Plans that have been delivered already.

    Yields:
        Every N-th planned micro-batch if there are N workers, or, as its last item, the error
        that ended it: torch's DataLoader would turn a raised one into its traceback's text.
    """
    return DataPipeline(  # pyright: ignore[reportReturnType] - untyped; it is one
        EveryNthPlan(plans, skip),
        filters.map(LoadClips(load_clip, memory)),
        filters.map(CollateClips(collate)),
        errors_as_last_item,
        Deadline(load_clip.config.worker_timeout_seconds),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadedPlan:
    """A micro-batch's plan, its clips in the order of their positions, and where they lie."""

    plan: MicroBatchPlan
    clips: tuple[Clip, ...]
    place: BlockPlace | None


@dataclass(frozen=True, slots=True)
class EveryNthPlan:
    """Worker w of N takes the plans w, w + N, …; DataLoader's round robin restores their order."""

    plans: Plans
    skip: int = 0

    def __call__(self) -> Iterator[MicroBatchPlan]:
        """The plans of the process that calls this."""
        worker = torch.utils.data.get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker else (0, 1)
        plans = self.plans() if callable(self.plans) else self.plans
        return islice(plans, self.skip + first, None, step)


@dataclass(frozen=True, slots=True)
class LoadClips:
    """Fill a plan with its clips, one behind the other in the memory that is handed over."""

    load_clip: LoadClip
    memory: SharedMemory

    def __call__(self, plan: MicroBatchPlan) -> LoadedPlan:
        """Load the clip of every position of the plan."""
        shape = (plan.size, plan.frames, plan.resolution, plan.resolution, 3)
        block = self.memory.blocks.take(shape)
        clips = []
        for position, video_THWC in zip(plan.positions, block.video_BTHWC, strict=True):
            clip = self.load_clip(position, plan, self.memory.note)
            video_CTHW = video_THWC.permute(3, 0, 1, 2).copy_(clip.video_CTHW)
            clips.append(replace(clip, video_CTHW=video_CTHW))
        self.memory.note(-1, -1)
        return LoadedPlan(plan=plan, clips=tuple(clips), place=block.place)


@dataclass(frozen=True, slots=True)
class CollateClips:
    """Stack the clips and draw their masks, by a function from the room of masks."""

    collate: Collate

    def __call__(self, loaded: LoadedPlan) -> Sent:
        """One micro-batch, ready to be handed over."""
        return Sent(batch=self.collate(loaded.clips, loaded.plan), place=loaded.place)


def errors_as_last_item(batches: Iterator[Sent]) -> Iterator[Sent | JepaError]:
    """Hand an error on as an item, so that it crosses the process border whole."""
    try:
        yield from batches
    except JepaError as error:
        yield error


@dataclass(frozen=True, slots=True)
class Deadline:
    """Ends a worker that hangs; the training process itself is guarded by the engine."""

    seconds: float

    def __call__(self, batches: Iterator[Sent | JepaError]) -> Iterator[Sent | JepaError]:
        """The same batches, each in time."""
        in_worker = torch.utils.data.get_worker_info() is not None
        return with_deadline(batches, self.seconds) if in_worker else batches
