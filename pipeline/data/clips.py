"""One clip from start to end: which sample, which moments, decode, crop.

One bad video never shifts the order: its place is taken by a deterministic substitute from the
same source, and the fault travels with the clip, so that the run can name, count and bound it.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch.utils.data import get_worker_info

from pipeline.clip import Clip, ClipRef, MicroBatchPlan, SampleFault
from pipeline.data.augment import CropBox, CropSpec, crop, random_box
from pipeline.data.badmedia import BadMediaError, BadReason
from pipeline.data.companions import read_companions
from pipeline.data.confine import confined
from pipeline.data.decode import decode_frames
from pipeline.data.format import IndexRecord, Member, ShardIndex
from pipeline.data.order import OrderSpec, Purpose, clip_ref, random_units
from pipeline.data.sampling import clip_times, reference_times
from pipeline.data.settings import DataConfig
from pipeline.errors import DataError


def open_sources(config: DataConfig) -> tuple[ShardIndex, ...]:
    """Open and verify the datasets of the mixture.

    Raises:
        UsageError: A folder holds no finished dataset.
        DataError: A dataset does not agree with its manifest.
    """
    policy = config.on_damaged_shard
    return tuple(ShardIndex.open(source.path, on_damaged_shard=policy) for source in config.sources)


def make_order(config: DataConfig, datasets: Sequence[ShardIndex], seed: int) -> OrderSpec:
    """The order of samples that the configuration and the run's seed stand for."""
    return OrderSpec(
        seed=seed,
        sizes=tuple(len(dataset) for dataset in datasets),
        weights=tuple(source.weight for source in config.sources),
        block=config.mixture_block,
        tables=tuple(
            dataset.weights if source.sample_weights else None
            for source, dataset in zip(config.sources, datasets, strict=True)
        ),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadClip:
    """One clip: the sample that the order names, or its first good substitute."""

    config: DataConfig
    order: OrderSpec
    datasets: tuple[ShardIndex, ...]
    deadly: Mapping[tuple[int, int], str] = field(default_factory=dict)
    """Source and number of samples that killed a worker, and how; not tried again."""

    def __call__(
        self,
        position: int,
        plan: MicroBatchPlan,
        note: Callable[[int, int], None] = lambda _position, _attempt: None,
    ) -> Clip:
        """The clip at a global position, in the size that the plan asks for.

        Args:
            position: Global position.
            plan: The micro-batch that it belongs to.
            note: Is told position and attempt before they are tried.

        Raises:
            DataError: The sample and all its substitutes are bad.
            StorageError: A shard cannot be read.
        """
        faults: list[SampleFault] = []
        for attempt in range(1 + self.config.max_substitutes):
            ref = clip_ref(self.order, position, attempt)
            note(position, attempt)
            try:
                return replace(self._load(ref, plan), faults=tuple(faults))
            except BadMediaError as error:
                faults.append(self._fault(ref, error))
        last = faults[-1]
        error = DataError(
            f"position {position}: a sample and {self.config.max_substitutes} substitutes of "
            f"{last.dataset} are all bad; the last one, {last.key} in {last.shard}: {last.reason}"
        )
        error.faults = tuple(faults)
        raise error

    def sample_at(self, position: int, attempt: int) -> tuple[int, int]:
        """Source and number of the sample that an attempt at a position tries."""
        ref = clip_ref(self.order, position, attempt)
        return ref.source, ref.sample

    def describe(self, position: int, attempt: int = 0) -> str:
        """The sample at a global position, for messages."""
        ref = clip_ref(self.order, position, attempt)
        dataset = self.datasets[ref.source]
        record = dataset.record(ref.sample)
        return f"{record.key} in {dataset.shard_path(record)} (position {position})"

    def _load(self, ref: ClipRef, plan: MicroBatchPlan) -> Clip:
        how = self.deadly.get((ref.source, ref.sample))
        if how is not None:
            raise BadMediaError(BadReason.DECODER_KILLED, how)
        dataset = self.datasets[ref.source]
        record = dataset.record(ref.sample)
        payload = dataset.read_member(record, Member.VIDEO)
        times_T = self._times(record, ref.position, plan)
        boxes: list[CropBox] = []

        def part(height: int, width: int) -> tuple[slice, slice]:
            boxes.append(self._box(ref.position, height, width))
            return boxes[-1].rows_and_columns

        # The training process itself, which decodes if there are no workers, must not die.
        in_worker = get_worker_info() is not None
        with confined(self.config.decode) if in_worker else nullcontext():
            decoded = decode_frames(payload, times_T, self.config.decode, part)
        video_CTHW = crop(
            decoded.frames_THWC,
            boxes[-1].inside,
            plan.resolution,
            antialias=self.config.antialias,
        )
        companions = read_companions(dataset, record, decoded.times, self.config.companions)
        return Clip(
            ref=ref,
            key=record.key,
            video_CTHW=video_CTHW,
            times=torch.from_numpy(decoded.times),
            text=companions.text,
            states=companions.states_TS,
            actions=companions.actions_TA,
        )

    def _times(self, record: IndexRecord, position: int, plan: MicroBatchPlan) -> np.ndarray:
        unit = float(random_units(self.order.seed, position, Purpose.CLIP_START, 1)[0])
        if self.config.sampling == "time":
            return clip_times(record.duration_seconds, plan.frames, plan.fps, unit)
        try:
            return reference_times(
                duration_seconds=record.duration_seconds,
                video_frames=record.num_frames,
                num_frames=plan.frames,
                fps=plan.fps,
                unit=unit,
            )
        except ValueError as error:
            raise BadMediaError(BadReason.TOO_SHORT, str(error)) from error

    def _box(self, position: int, height: int, width: int) -> CropBox:
        spec = CropSpec(
            scale=self.config.crop_scale,
            aspect_ratio=self.config.crop_aspect_ratio,
            horizontal_flip=self.config.horizontal_flip,
        )
        return random_box(spec, height=height, width=width, seed=self.order.seed, position=position)

    def _fault(self, ref: ClipRef, error: BadMediaError) -> SampleFault:
        dataset = self.datasets[ref.source]
        record = dataset.record(ref.sample)
        return SampleFault(
            position=ref.position,
            dataset=str(dataset.path),
            shard=dataset.shard_path(record).name,
            key=record.key,
            reason=str(error),
        )
