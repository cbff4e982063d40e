"""A small dataset of real clips in the form that preparation writes, for benchmarks.

H.264 of 384 lines, 8 frames per second, a keyframe every 16, no B-frames, tuned for decoding.
"""

import hashlib
import io
from pathlib import Path

import av
import numpy as np
from webdataset.writer import TarWriter

from pipeline.data.decode import DecodeLimits, decode_frames, probe_media
from pipeline.data.indexing import build_index
from pipeline.data.layout import Sidecar

REAL_VIDEOS = Path(__file__).parent.parent / "tests" / "data" / "videos"
REAL_NAMES = (
    "av1_540p_15s.mp4",
    "bikes_640x272.mp4",
    "carphone_qcif.mp4",
    "nasa_320x180_2streams.mp4",
    "screen_1080p.mp4",
)
_SHORT_SIDE = 384
_FPS = 8
_MAX_SECONDS = 10.0


def write_real_dataset(folder: Path) -> Path:
    """One shard with the project's real test clips, transcoded; a few seconds of work."""
    folder.mkdir(parents=True)
    shard = folder / "shard-000000.tar"
    with shard.open("wb") as file, TarWriter(file, mtime=0) as writer:
        for name in REAL_NAMES:
            writer.write(_sample(REAL_VIDEOS / name))
    build_index(folder)
    return folder


def _sample(path: Path) -> dict[str, object]:
    original = path.read_bytes()
    info = probe_media(original, DecodeLimits(), decode_everything=True)
    seconds = min(info.duration_seconds, _MAX_SECONDS)
    times = np.arange(int(seconds * _FPS)) / _FPS
    frames_THWC = decode_frames(original, times, DecodeLimits(max_seconds=120.0)).frames_THWC
    scale = _SHORT_SIDE / min(info.width, info.height)
    width, height = (2 * round(side * scale / 2) for side in (info.width, info.height))
    video = _encode(frames_THWC, width, height)
    sidecar = Sidecar(
        key=path.stem,
        source=path.name,
        source_sha256=hashlib.sha256(original).hexdigest(),
        segment_start_seconds=0.0,
        segment_end_seconds=len(times) / _FPS,
        num_frames=len(times),
        fps=float(_FPS),
        duration_seconds=len(times) / _FPS,
        width=width,
        height=height,
        codec="h264",
        video_bytes=len(video),
        video_sha256=hashlib.sha256(video).hexdigest(),
    )
    text = sidecar.model_dump_json().encode()
    return {"__key__": path.stem, "json": text, "mp4": video}


def _encode(frames_THWC: np.ndarray, width: int, height: int) -> bytes:
    buffer = io.BytesIO()
    options = {"preset": "veryfast", "tune": "fastdecode", "crf": "23", "g": "16", "bf": "0"}
    with av.open(buffer, mode="w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=_FPS, options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for picture_HWC in frames_THWC:
            frame = av.VideoFrame.from_ndarray(picture_HWC, format="rgb24")
            container.mux(stream.encode(frame.reformat(width, height, "yuv420p", threads=1)))
        container.mux(stream.encode(None))
    return buffer.getvalue()
