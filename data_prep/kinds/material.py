"""What a source is to the steps that follow: always a video, and maybe a trajectory with it."""

from dataclasses import dataclass
from pathlib import Path

from data_prep.kinds.still import still_clip
from data_prep.kinds.trajectory import Trajectory, episode
from data_prep.records import Source
from data_prep.settings import PrepSettings


@dataclass(frozen=True, kw_only=True, slots=True)
class Material:
    """A video to be cut, and what was recorded with it on the same clock."""

    content: Path | bytes
    trajectory: Trajectory | None = None

    def members(self, start_seconds: float, end_seconds: float) -> dict[str, bytes]:
        """Members that a part of the video has beside its pictures, by suffix."""
        if self.trajectory is None:
            return {}
        return self.trajectory.members(start_seconds, end_seconds)


def material(source: Source, content: Path | bytes, settings: PrepSettings) -> Material:
    """The video that a source stands for: itself, a picture held still, or an episode's frames.

    Args:
        source: What it is.
        content: Its file, or the bytes of it.
        settings: How the dataset is prepared.

    Raises:
        BadMediaError: A picture or a trajectory cannot be used, or lengths disagree.
    """
    if source.kind == "image":
        return Material(content=still_clip(content, settings))
    if source.kind == "episode":
        serial = Path(source.locator).stem
        video, trajectory = episode(content, source.trajectory or "", serial)
        return Material(content=video, trajectory=trajectory)
    return Material(content=content)
