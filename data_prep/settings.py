"""What a dataset is prepared with; recorded in its manifest."""

import json
from collections.abc import Mapping
from typing import ClassVar, Literal, Self, cast

from pydantic import Field, JsonValue, model_validator

from pipeline.config.section import Section
from pipeline.data.decode import DecodeLimits


class PrepSettings(Section):
    """What the shards hold: the same sources and settings give the same bytes."""

    keys_are_in: ClassVar[str] = "`jepa prep run --help` has a flag for every key"
    has_shipped_files: ClassVar[bool] = False

    short_side: int = Field(default=384, ge=16)
    """Short side of the stored picture in pixels; smaller videos keep their size."""
    fps: float | Literal["native"] = 8.0
    """Constant frames per second of the stored video, or `native` for the source's own rate."""
    mode: Literal["transcode", "copy"] = "transcode"
    """`copy` keeps the bytes of videos that already are what transcoding would produce."""
    cut: Literal["shots", "stride"] = "shots"
    """Cut where the scene changes and then into equal parts, or into equal parts alone."""
    shot_threshold: float = Field(default=3.0, gt=0)
    """How many times the change around it a scene's change must be; lower finds more."""
    min_shot_seconds: float = Field(default=4.0, ge=0)
    """Shots of a video of several that are shorter than this are left out."""
    min_seconds: float = Field(default=1.0, gt=0)
    """Videos of which less than this decodes are refused."""
    max_seconds: float = Field(default=32.0, gt=0)
    """Longer shots are cut into equal segments of at most this length."""
    min_side: int = Field(default=32, ge=16)
    """Videos whose shorter side has fewer pixels are refused."""
    min_motion: float = Field(default=0.0, ge=0)
    """Segments whose pictures change less are left out, in grey levels of 255 a second."""
    max_black_share: float = Field(default=0.95, ge=0, le=1)
    """Segments with a larger share of black pictures are left out; 1 keeps all."""
    max_still_share: float = Field(default=1.0, ge=0, le=1)
    """Segments with a larger share of pictures like the one before are left out; 1 keeps all."""
    duplicates: Literal["keep", "exact", "near"] = "exact"
    """Leave out segments whose stored video was there before: equal bytes, or also look-alikes."""
    near_bits: float = Field(default=6.0, ge=0, le=32)
    """Bits of 64 by which pictures of look-alikes may differ on average."""
    bins: Literal["none", "aspect", "aspect-and-length"] = "none"
    """Give segments of one shape (wide, square, tall) and length shards of their own."""
    samples_per_shard: int = Field(default=1000, ge=1)
    """Segments that go into one shard at most."""
    shard_mib: float = Field(default=1024.0, gt=0)
    """Size of a shard in MiB, at most, unless one segment alone is larger."""
    crf: int = Field(default=23, ge=0, le=51)
    """Quality of the H.264 encoder: lower is better and larger, 6 less doubles the size."""
    gop_frames: int = Field(default=16, ge=1)
    """Distance of keyframes; the decode of a clip starts at one."""
    time_limit_seconds: float = Field(default=600.0, gt=0)
    """Processor time one video may take to be checked, and again to be transcoded."""
    max_pixels: int = Field(default=4096 * 2304, ge=1)
    """Videos with larger pictures are refused before they are decoded."""
    max_memory_mib: float = Field(default=4096.0, gt=0)
    """Address space that decoding one video may add to a process, in MiB; a sixteenth more is for
    its pictures that wait to be encoded."""

    @model_validator(mode="after")
    def _fit_together(self) -> Self:
        if self.min_seconds > self.max_seconds:
            raise ValueError(
                f"max_seconds must be at least min_seconds ({self.min_seconds:g}), "
                f"got {self.max_seconds:g}"
            )
        if self.fps != "native" and not 0 < float(self.fps) <= 240:
            raise ValueError(f"fps must be `native` or a rate from 0 to 240, got {self.fps}")
        return self

    @property
    def limits(self) -> DecodeLimits:
        """The decoder's limits for one pass over a source."""
        return DecodeLimits(
            max_pixels=self.max_pixels,
            max_seconds=float(self.time_limit_seconds),
            max_bytes=1 << 40,
            max_memory_bytes=int(self.max_memory_mib * 2**20),
        )

    def as_json(self) -> dict[str, JsonValue]:
        """All settings, for the manifest and for comparison with another preparation's."""
        return cast("dict[str, JsonValue]", self.model_dump(mode="json"))

    def digest_text(self) -> str:
        """One line that differs if any setting does."""
        return json.dumps(self.as_json(), sort_keys=True)

    def differences(self, earlier: Mapping[str, JsonValue]) -> list[str]:
        """What differs from the settings of an earlier preparation, in the words of the flags."""
        return [
            f"--{name.replace('_', '-')} was {json.dumps(earlier.get(name))}, "
            f"now {json.dumps(value)}"
            for name, value in self.as_json().items()
            if earlier.get(name) != value
        ]
