"""The `data` section of a run's configuration."""

from typing import Literal, Self

from pydantic import Field, model_validator

from pipeline.config.section import Section
from pipeline.data.companions import Companion
from pipeline.data.decode import DecodeLimits


class Source(Section):
    """One dataset of the mixture."""

    path: str = Field(min_length=1)
    """Folder that `jepa prep run` wrote, with its manifest.json."""
    weight: float = Field(default=1.0, gt=0.0)
    """Share of the clips that come from here, relative to the other sources' weights."""
    sample_weights: bool = True
    """Draw samples in proportion to the dataset's weights.npy, if it has one; else all alike."""


class DataConfig(Section):
    """Where clips come from and how they are cut."""

    sources: tuple[Source, ...] = Field(min_length=1, strict=False)
    """Datasets that are mixed; every one keeps its own epochs."""
    mixture_block: int = Field(default=1000, ge=1)
    """Clips within which the weights hold exactly; larger only for very many sources."""
    sampling: Literal["time", "reference"] = "time"
    """Frames evenly spaced in time at the stage's fps, or by the rule of the released V-JEPA 2
    loader, which takes 4.28 fps where 4 are asked for of a 30 fps video."""
    crop_scale: tuple[float, float] = Field(default=(0.3, 1.0), strict=False)
    """Smallest and largest share of the picture's area that a random crop covers."""
    crop_aspect_ratio: tuple[float, float] = Field(default=(0.75, 1.35), strict=False)
    """Smallest and largest width of a random crop divided by its height."""
    horizontal_flip: float = Field(default=0.5, ge=0.0, le=1.0)
    """Share of the clips that are mirrored; 0 where left and right are what is to be learnt."""
    companions: tuple[Companion, ...] = Field(default=(), strict=False)
    """What clips carry beside their pictures: captions, states, actions; what is not needed is
    not read."""
    antialias: bool = False
    """Low-pass before shrinking a crop; the reference does not."""
    workers: int = Field(default=4, ge=0)
    """Processes per rank that decode; 0 decodes in the training process itself."""
    prefetch: int = Field(default=2, ge=1)
    """Micro-batches that every worker keeps ready; each takes shared memory."""
    worker_timeout_seconds: float = Field(default=600.0, gt=0.0)
    """Longest wait for one micro-batch before the workers are taken to hang."""
    max_worker_deaths: int = Field(default=8, ge=0)
    """Workers of one rank that may be lost and restarted before the run stops; those that died of
    a video count as bad samples instead."""
    on_damaged_shard: Literal["stop", "quarantine"] = "stop"
    """Whether a run begins if a shard is missing or of another size; `quarantine` replaces what is
    gone of it as bad samples, within the same limits."""
    max_substitutes: int = Field(default=8, ge=1)
    """Samples tried in place of a bad one before the run stops."""
    max_bad_samples: int = Field(default=32, ge=0)
    """Bad samples that one rank tolerates whatever share they make up."""
    max_bad_fraction: float = Field(default=0.01, ge=0.0, le=1.0)
    """Bad samples that one rank tolerates beyond that, as a share of the clips it has trained."""
    decode: DecodeLimits = DecodeLimits()
    """Limits that a video must keep to be decoded."""

    @model_validator(mode="after")
    def _ranges_are_ordered(self) -> Self:
        low, high = self.crop_scale
        if not 0.0 < low <= high <= 1.0:
            raise ValueError(f"crop_scale must be [low, high], 0 < low <= high <= 1: {low}, {high}")
        low, high = self.crop_aspect_ratio
        if not 0.0 < low <= high:
            raise ValueError(
                f"crop_aspect_ratio must be [low, high], 0 < low <= high: {low}, {high}"
            )
        return self
