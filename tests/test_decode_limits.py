"""What a video may cost, and that no bytes whatsoever give anything but frames or a refusal."""

import io
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pipeline.data.decode import BadMediaError, BadReason, DecodeLimits, decode_frames, probe_media
from tests.test_decode_frames import VIDEOS, grid_video

ZERO = np.array([0.0])


def reason_of(payload: bytes, limits: DecodeLimits | None = None) -> BadReason:
    with pytest.raises(BadMediaError) as caught:
        decode_frames(payload, ZERO, limits or DecodeLimits())
    return caught.value.reason


def test_each_limit_refuses_with_its_own_reason() -> None:
    payload = grid_video(num_frames=8)
    assert reason_of(payload, DecodeLimits(max_pixels=64 * 48 - 1)) is BadReason.TOO_LARGE
    assert reason_of(payload, DecodeLimits(max_bytes=100)) is BadReason.TOO_MANY_BYTES
    assert reason_of(payload, DecodeLimits(max_seconds=1e-9)) is BadReason.TIME_LIMIT
    assert reason_of(payload, DecodeLimits(max_clip_bytes=9000)) is BadReason.MEMORY_LIMIT
    assert reason_of(b"") is BadReason.EMPTY
    exact = DecodeLimits(max_pixels=64 * 48, max_bytes=len(payload), max_clip_bytes=64 * 48 * 3)
    assert decode_frames(payload, ZERO, exact).frames_THWC.shape == (1, 48, 64, 3)


MEASURE = """
import resource, sys
from pathlib import Path
from pipeline.data.decode import BadMediaError, DecodeLimits, probe_media
payload = Path(sys.argv[1]).read_bytes()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    probe_media(payload, DecodeLimits(), decode_everything=True)
except BadMediaError as error:
    print(error.reason, "|", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_a_picture_bomb_is_refused_before_it_takes_memory() -> None:
    bomb = VIDEOS / "huge_8192.mp4"
    command = [sys.executable, "-c", MEASURE, str(bomb)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    reason, kib = done.stdout.strip().split(" | ")
    # Decoded without a limit at opening this one takes 300 MiB.
    assert (reason, int(kib) < 60 * 1024) == ("picture too large", True)


@pytest.mark.parametrize(
    "playlist",
    [
        "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{path}\n#EXT-X-ENDLIST\n",
        "ffconcat version 1.0\nfile '{path}'\n",
        "v=0\nc=IN IP4 127.0.0.1\nm=video 5004 RTP/AVP 96\na=rtpmap:96 H264/90000\n",
        "<MPD><Period><BaseURL>{path}</BaseURL></Period></MPD>",
        "{path}",
    ],
    ids=["hls", "concat", "sdp", "dash", "path"],
)
def test_a_playlist_cannot_make_the_decoder_open_another_file(playlist: str) -> None:
    text = playlist.format(path=(VIDEOS / "carphone_qcif.mp4").resolve())
    assert reason_of(text.encode()) is BadReason.NOT_A_VIDEO


@pytest.mark.parametrize("kind", ["folder", "pipe", "device", "missing"])
def test_what_is_no_regular_file_is_refused_at_once(tmp_path: Path, kind: str) -> None:
    path = {"folder": tmp_path, "device": Path("/dev/zero")}.get(kind, tmp_path / kind)
    if kind == "pipe":
        os.mkfifo(path)
    with pytest.raises(BadMediaError) as caught:
        probe_media(path, DecodeLimits())
    assert caught.value.reason is BadReason.NOT_A_FILE


def test_mutated_files_give_frames_or_a_reason_and_nothing_else() -> None:
    generator = np.random.default_rng(7)
    originals = [(VIDEOS / name).read_bytes() for name in ("nonzero_start.mp4", "one_frame.mp4")]
    outcomes = {"frames": 0, "refused": 0}
    limits = DecodeLimits(max_seconds=20)
    for trial in range(150):
        payload = bytearray(originals[trial % 2])
        for _ in range(generator.integers(1, 20)):
            payload[generator.integers(len(payload))] = generator.integers(256)
        if trial % 5 == 0:
            del payload[generator.integers(len(payload)) :]
        try:
            got = decode_frames(bytes(payload), np.array([0.0, 0.2]), limits)
            assert got.frames_THWC.shape[0] == 2
            assert np.isfinite(got.times).all()
            outcomes["frames"] += 1
        except BadMediaError:
            outcomes["refused"] += 1
    assert min(outcomes.values()) > 10


def test_decoding_starts_no_thread_and_leaves_nothing_open() -> None:
    def count(kind: str) -> int:
        return len(list(Path(f"/proc/self/{kind}").iterdir()))

    payload = (VIDEOS / "bikes_640x272.mp4").read_bytes()
    decode_frames(payload, ZERO, DecodeLimits())
    before = count("task"), count("fd")
    for start in np.linspace(0, 9, 5):
        decode_frames(payload, start + np.arange(4) / 4, DecodeLimits())
        assert count("task") == before[0]
    assert (count("task"), count("fd")) == before


def test_a_refusal_survives_the_way_between_processes() -> None:
    import pickle  # noqa: PLC0415

    error = BadMediaError(BadReason.TOO_SHORT, "0.1 s")
    again = pickle.loads(pickle.dumps(error))  # noqa: S301 - our own, a moment ago
    assert (again.reason, again.detail, str(again)) == (
        BadReason.TOO_SHORT,
        "0.1 s",
        "too short: 0.1 s",
    )


def test_an_audio_file_with_a_cover_picture_has_no_video() -> None:
    import av  # noqa: PLC0415

    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp3") as container:
        audio = container.add_stream("libmp3lame", rate=44100, layout="mono")
        cover = container.add_stream("mjpeg", rate=1)
        cover.width, cover.height, cover.pix_fmt = 32, 32, "yuvj420p"
        cover.disposition = av.stream.Disposition.attached_pic
        picture = av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")
        container.mux(cover.encode(picture))
        container.mux(cover.encode(None))
        sound = av.AudioFrame.from_ndarray(
            np.zeros((1, 1152), np.float32), format="fltp", layout="mono"
        )
        sound.rate = 44100
        container.mux(audio.encode(sound))
        container.mux(audio.encode(None))
    assert reason_of(buffer.getvalue()) is BadReason.NO_VIDEO_STREAM
