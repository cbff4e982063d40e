"""The transcode of the preparation with nothing around it: what its speed is compared with."""

import math
import shutil
import subprocess
from fractions import Fraction
from pathlib import Path

import av

from data_prep.settings import PrepSettings

_PRESET = "veryfast"


def transcode_plainly(source: Path, target: Path, settings: PrepSettings) -> None:
    """Makes one file of one file, by `ffmpeg` if it is installed, else by a loop over PyAV."""
    if shutil.which("ffmpeg"):
        _by_ffmpeg(source, target, settings)
    else:
        _by_loop(source, target, settings)


def _by_ffmpeg(source: Path, target: Path, settings: PrepSettings) -> None:
    side = settings.short_side
    scale = f"scale='if(gt(iw,ih),-2,min(iw,{side}))':'if(gt(iw,ih),min(ih,{side}),-2)'"
    words = (
        f"ffmpeg -v error -y -threads 1 -i file:{source} -an -filter_threads 1 "
        f"-vf fps={settings.fps},{scale},format=yuv420p -c:v libx264 -threads 1 "
        f"-preset {_PRESET} -tune fastdecode -crf {settings.crf} -bf 0 -g {settings.gop_frames} "
        f"-x264-params mbtree=0 {target}"
    )
    subprocess.run(words.split(), check=True, stdin=subprocess.DEVNULL)


def _by_loop(source: Path, target: Path, settings: PrepSettings) -> None:
    fps = Fraction(settings.fps).limit_denominator(1001)
    with av.open(str(source)) as given, av.open(str(target), "w", format="mp4") as made:
        shown = given.streams.video[0]
        shown.thread_type, shown.codec_context.thread_count = "NONE", 1
        scale = min(1.0, settings.short_side / min(shown.width, shown.height))
        width, height = (round(side * scale / 2) * 2 for side in (shown.width, shown.height))
        options = {
            "crf": str(settings.crf),
            "preset": _PRESET,
            "tune": "fastdecode",
            "bf": "0",
            "g": str(settings.gop_frames),
            "x264-params": "mbtree=0",
        }
        stream = made.add_stream("libx264", rate=fps, options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.thread_count = 1
        begin, number = None, 0
        for frame in given.decode(shown):
            begin = frame.time if begin is None else begin
            due = math.floor((frame.time - begin) * fps) + 1
            if due <= number:
                continue
            small = frame.reformat(width=width, height=height, format="yuv420p", threads=1)
            for place in range(number, due):
                small.pts, small.time_base = place, 1 / fps
                small.pict_type = 0
                made.mux(stream.encode(small))
            number = due
        made.mux(stream.encode(None))
