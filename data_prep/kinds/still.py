"""A picture → a short clip that shows it in every frame, for mixtures of images and videos."""

import io
from pathlib import Path

import av
from av.video.frame import VideoFrame
from PIL import Image, ImageOps, UnidentifiedImageError

from data_prep.settings import PrepSettings
from pipeline.data.badmedia import BadMediaError, BadReason

_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF")
_MIN_SECONDS = 1.0
_NATIVE_FPS = 8


def still_clip(content: Path | bytes, settings: PrepSettings) -> bytes:
    """A lossless clip of a picture, a second long or `settings.min_seconds`.

    It need not be longer: the loader repeats a video's last frame for as long as a clip lasts.
    The picture is turned as its EXIF data say and shrunk to the size that is stored.

    Args:
        content: The picture's file.
        settings: How the dataset is prepared.

    Raises:
        BadMediaError: It is no picture, is damaged, too large or too small.
    """
    picture = _picture(content, settings)
    fps = _NATIVE_FPS if settings.fps == "native" else max(1, round(float(settings.fps)))
    num_frames = max(1, round(max(_MIN_SECONDS, float(settings.min_seconds)) * fps))
    frame = VideoFrame.from_image(picture).reformat(format="yuv444p", threads=1)
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="matroska", options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream(
            "libx264", rate=fps, options={"qp": "0", "preset": "ultrafast", "bf": "0"}
        )
        stream.width, stream.height, stream.pix_fmt = frame.width, frame.height, "yuv444p"
        stream.codec_context.thread_count = 1
        for number in range(num_frames):
            frame.pts = number
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return buffer.getvalue()


def _picture(content: Path | bytes, settings: PrepSettings) -> Image.Image:
    try:
        with Image.open(
            io.BytesIO(content) if isinstance(content, bytes) else content, formats=_FORMATS
        ) as opened:
            width, height = opened.size
            if width * height > settings.max_pixels:
                raise BadMediaError(
                    BadReason.TOO_LARGE,
                    f"{width}×{height}, the limit is {settings.max_pixels} pixels",
                )
            picture = ImageOps.exif_transpose(opened).convert("RGB")
    except UnidentifiedImageError as error:
        raise BadMediaError(BadReason.NOT_A_VIDEO, "nor a picture of a known format") from error
    except Image.DecompressionBombError as error:
        raise BadMediaError(BadReason.TOO_LARGE, str(error)) from error
    except (OSError, SyntaxError, ValueError) as error:
        raise BadMediaError(BadReason.UNDECODABLE, str(error)[:200]) from error
    return _shrunk(picture, settings)


def _shrunk(picture: Image.Image, settings: PrepSettings) -> Image.Image:
    short = min(picture.size)
    if short < settings.min_side:
        raise BadMediaError(
            BadReason.TOO_SMALL,
            f"{picture.width}×{picture.height}, at least {settings.min_side} pixels are needed",
        )
    if short <= settings.short_side:
        return picture
    width, height = (max(1, round(side * settings.short_side / short)) for side in picture.size)
    return picture.resize((width, height), Image.Resampling.LANCZOS)
