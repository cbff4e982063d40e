"""What a dataset is prepared with; recorded in its manifest."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Literal, cast

from pydantic import JsonValue

from pipeline.data.decode import DecodeLimits
from pipeline.errors import UsageError


@dataclass(frozen=True, kw_only=True, slots=True)
class PrepSettings:
    """What the shards hold: the same sources and settings give the same bytes."""

    short_side: int = 384
    """Short side of the stored picture in pixels; smaller videos keep their size."""
    fps: float | Literal["native"] = 8.0
    """Constant frames per second of the stored video, or `native` for the source's own rate."""
    mode: Literal["transcode", "copy"] = "transcode"
    """`copy` keeps the bytes of videos that already are what transcoding would produce."""
    min_seconds: float = 1.0
    """Videos of which less than this decodes are refused."""
    max_seconds: float = 32.0
    """Longer videos are cut into equal segments of at most this length."""
    min_side: int = 32
    """Videos whose shorter side has fewer pixels are refused."""
    videos_per_shard: int = 64
    """Source videos that go into one shard at most; a shard is one Ray task."""
    shard_mib: float = 256.0
    """Size of the source videos that go into one shard at most, in MiB."""
    crf: int = 23
    """Quality of the H.264 encoder: lower is better and larger, 6 less doubles the size."""
    gop_frames: int = 16
    """Distance of keyframes; the decode of a clip starts at one."""
    time_limit_seconds: float = 600.0
    """Wall time one video may take to be checked, and again to be transcoded."""
    max_pixels: int = 4096 * 2304
    """Videos with larger pictures are refused before they are decoded."""

    def __post_init__(self) -> None:
        wrong = [message for holds, message in self._rules() if not holds]
        if wrong:
            raise UsageError("; ".join(wrong) + ".", remedy="See `jepa prep run --help`.")

    def _rules(self) -> tuple[tuple[bool, str], ...]:
        fps_holds = self.fps == "native" or 0 < float(self.fps) <= 240
        return (
            (self.short_side >= 16, f"--short-side must be at least 16, got {self.short_side}"),
            (fps_holds, f"--fps must be `native` or a rate from 0 to 240, got {self.fps}"),
            (self.min_seconds > 0, f"--min-seconds must be above 0, got {self.min_seconds}"),
            (
                self.min_seconds <= self.max_seconds,
                f"--max-seconds must be at least --min-seconds ({self.min_seconds:g}), "
                f"got {self.max_seconds:g}",
            ),
            (self.min_side >= 16, f"--min-side must be at least 16, got {self.min_side}"),
            (
                self.videos_per_shard >= 1,
                f"--videos-per-shard must be at least 1, got {self.videos_per_shard}",
            ),
            (self.shard_mib > 0, f"--shard-mib must be above 0, got {self.shard_mib}"),
            (0 <= self.crf <= 51, f"--crf must be from 0 to 51, got {self.crf}"),
            (self.gop_frames >= 1, f"--gop-frames must be at least 1, got {self.gop_frames}"),
            (
                self.time_limit_seconds > 0,
                f"--time-limit-seconds must be above 0, got {self.time_limit_seconds}",
            ),
            (self.max_pixels >= 1, f"--max-pixels must be at least 1, got {self.max_pixels}"),
        )

    @property
    def limits(self) -> DecodeLimits:
        """The decoder's limits for one pass over a source."""
        return DecodeLimits(
            max_pixels=self.max_pixels,
            max_seconds=float(self.time_limit_seconds),
            max_bytes=1 << 40,
        )

    def as_json(self) -> dict[str, JsonValue]:
        """All settings, for the manifest and for comparison with another preparation's."""
        return cast("dict[str, JsonValue]", asdict(self))

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
