"""The files of `RUN/probes`: one JSON for each checkpoint and task, pictures of its hardest clips.

TASK-STEP-WHICH.json            what was asked, on what, and under `scores` every head and seed
earlier/TASK-STEP-WHICH-….json  the same of other settings or another encoder, by time of writing
pictures/TASK-STEP-WHICH.npz    frames of the hardest clips by position, uint8 [T, H, W, 3]
heads/TASK-STEP-WHICH-….safetensors   weights of attentive heads, where they were asked for
"""

import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import interpolate

from pipeline.errors import StorageError
from pipeline.files import write_atomically
from pipeline.probe.annotations import Split
from pipeline.probe.clips import ClipReader, VideoClip
from pipeline.probe.records import SCORE_FIELDS, ProbeRecord, ProbeRequest
from pipeline.probe.tasks import Augmentation
from pipeline.track.folder import PROBE_PICTURES, read_json_object, write_json

_MOST_PICTURES, _PICTURE_FRAMES, _PICTURE_PIXELS = 24, 4, 96


def write_results(
    records: Sequence[ProbeRecord], request: ProbeRequest, validation: Split
) -> Path | None:
    """Adds scores to the file of their checkpoint and task, and draws the clips they name.

    Scores of other heads and seeds that stand there are kept if they are of the same encoder, task
    and settings; what does not belong together is not put side by side.

    Returns:
        Where scores went that stood there and do not belong to these.

    Raises:
        StorageError: A file cannot be written.
    """
    path = request.out / f"{request.stem}.json"
    try:
        request.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"cannot make the folder {request.out}: {error.strerror}") from error
    fresh = document(records)
    before = read_json_object(path)
    same = all(before.get(key) == fresh[key] for key in ("encoder_digest", "task_digest"))
    earlier = None if same or not before else _set_aside(path)
    scores = _merged(before.get("scores", []) if same else [], fresh["scores"])
    seeds = sorted({score["seed"] for score in scores})
    write_json(path, {**fresh, "seeds": seeds, "scores": scores})
    _remove_single_files(request, fresh["scores"])
    _write_pictures(scores, request, validation)
    return earlier


def document(records: Sequence[ProbeRecord]) -> dict[str, Any]:
    """Records of one checkpoint and task as one object."""
    plain = [json.loads(json.dumps(asdict(record))) for record in records]
    shared = {key: value for key, value in plain[0].items() if key not in SCORE_FIELDS}
    scores = [{key: one[key] for key in one if key in SCORE_FIELDS} for one in plain]
    return {**shared, "scores": scores}


def _set_aside(path: Path) -> Path:
    stamp = datetime.fromtimestamp(path.stat().st_mtime, UTC).strftime("%Y%m%dT%H%M%S")
    target = path.parent / "earlier" / f"{path.stem}-{stamp}{path.suffix}"
    try:
        target.parent.mkdir(exist_ok=True)
        path.rename(target)
    except OSError as error:
        raise StorageError(f"cannot move {path} to {target}: {error.strerror}") from error
    return target


def _merged(old: Iterable[dict[str, Any]], new: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    found = {(score["head"], score["seed"]): score for score in (*old, *new)}
    return [found[key] for key in sorted(found)]


def _remove_single_files(request: ProbeRequest, scores: Sequence[dict[str, Any]]) -> None:
    """Earlier versions wrote one file per head and seed; they would be counted twice."""
    for score in scores:
        for old in request.out.glob(f"{request.stem}-{score['head']}-seed*.json"):
            old.unlink(missing_ok=True)


def _write_pictures(
    scores: Sequence[dict[str, Any]], request: ProbeRequest, validation: Split
) -> None:
    """Frames of the clips that heads of the first seeds found hardest."""
    wanted = [clip["position"] for score in scores for clip in score["hardest"]]
    clip = request.task.clip.model_copy(update={"frame_order": "forward", "segments": 1})
    reader = ClipReader(validation, clip, num_views=1, augmentation=Augmentation())
    strips = {}
    for position in list(dict.fromkeys(wanted))[:_MOST_PICTURES]:
        read = reader.read(position)
        if isinstance(read, VideoClip):
            strips[str(position)] = _strip(read.video_VSCTHW[0, 0])
    content = io.BytesIO()
    np.savez_compressed(content, **strips)
    path = request.out / PROBE_PICTURES / f"{request.stem}.npz"
    try:
        path.parent.mkdir(exist_ok=True)
        write_atomically(path, content.getvalue())
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror or error}") from error


def _strip(video_CTHW: torch.Tensor) -> np.ndarray:
    """A few small frames, uint8 [T, H, W, 3]."""
    times = torch.linspace(0, video_CTHW.shape[1] - 1, _PICTURE_FRAMES).round().long().unique()
    frames_TCHW = video_CTHW[:, times].transpose(0, 1).float()
    size = min(_PICTURE_PIXELS, frames_TCHW.shape[-1])
    small_TCHW = interpolate(frames_TCHW, (size, size), mode="bilinear", antialias=True)
    return small_TCHW.clamp(0, 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
