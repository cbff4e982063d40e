"""Kind `droid`: robot episodes as DROID records them, one folder each.

    …/trajectory.h5           states, commands and the times at which the cameras took pictures
    …/metadata_*.json         which camera stands where
    …/recordings/MP4/<serial>.mp4

The picture is the left exterior camera's. Its file says 60 frames a second where 15 were taken, so
`trajectory.py` puts the frames where the recorded times say.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_prep.kinds.folder import files_below
from data_prep.kinds.listing import (
    Listing,
    about_everything,
    base_name,
    opened_file,
    parent_of,
    printable,
    rows_of,
    status_of,
)
from data_prep.records import Labels, Source
from pipeline.errors import UsageError

TRAJECTORY = "trajectory.h5"
_LABELS = ("lab", "building", "scene_id", "user", "success", "uuid")


def sources(path: str, listing: Listing) -> Iterator[Source]:
    """The episodes below a folder, or of the folders that a text file lists."""
    for folder, name in _episodes(path, listing):
        source = _episode(folder, name, listing)
        if source is not None:
            yield source


def _episodes(path: str, listing: Listing) -> Iterator[tuple[str, str]]:
    """Path and name of each episode's folder."""
    if not Path(path).is_dir():
        base = listing.videos or parent_of(path)
        with opened_file(path) as file:
            for _, line in rows_of(file):
                yield str(Path(base) / line), line.strip("/")
        return
    quiet = Listing()
    for found in files_below(path, quiet):
        if base_name(found.path) == TRAJECTORY:
            yield parent_of(found.path), found.relative.rpartition("/")[0] or base_name(path)


def _episode(folder: str, name: str, listing: Listing) -> Source | None:
    name = printable(name)
    trajectory = f"{folder}/{TRAJECTORY}"
    recorded = status_of(trajectory)
    if recorded is None:
        listing.on_other(name, f"no {TRAJECTORY} in {folder}")
        return None
    found = sorted(Path(folder).glob("metadata_*.json"))
    known = _metadata(found[0]) if found else None
    if known is None or not known.get("left_mp4_path"):
        listing.on_other(name, "no metadata_*.json that names left_mp4_path")
        return None
    serial = Path(str(known["left_mp4_path"])).stem
    video = f"{folder}/recordings/MP4/{serial}.mp4"
    status = status_of(video)
    if status is None:
        listing.on_other(name, f"no recordings/MP4/{serial}.mp4")
        return None
    labels: Labels = {
        one: known[one] if isinstance(known[one], str) else int(known[one])
        for one in _LABELS
        if isinstance(known.get(one), str | int)
    }
    return Source(
        name=f"{name}/{serial}.mp4",
        locator=video,
        num_bytes=status.num_bytes,
        # A trajectory that was recorded anew makes another sample.
        modified_ns=max(status.modified_ns, recorded.modified_ns),
        kind="episode",
        labels=labels or None,
        captions=about_everything(str(known.get("current_task") or ""), "droid"),
        trajectory=trajectory,
    )


def _metadata(path: Path) -> dict[str, Any] | None:
    try:
        with opened_file(str(path)) as file:
            known = json.loads(file.read(1 << 22))
    except (UsageError, ValueError, RecursionError):
        return None
    return known if isinstance(known, dict) else None
