"""Pictures as clips that stand still, for tasks such as ImageNet; the importer of Pillow."""

import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from pipeline.data.badmedia import BadMediaError, BadReason

STILL_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp"})
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP")


def is_still(path: Path) -> bool:
    """Whether a file is a picture, by its name."""
    return path.suffix.lower() in STILL_SUFFIXES


def decode_still(payload: bytes, *, max_pixels: int) -> np.ndarray:
    """A picture as shown, uint8 RGB [1, H, W, 3].

    Args:
        payload: The file.
        max_pixels: The largest picture that is decoded; its header is asked first.

    Raises:
        BadMediaError: It is no picture of a known kind, too large, or damaged.
    """
    if not payload:
        raise BadMediaError(BadReason.EMPTY, "0 bytes")
    try:
        with Image.open(io.BytesIO(payload), formats=_FORMATS) as picture:
            width, height = picture.size
            if width * height > max_pixels:
                raise BadMediaError(
                    BadReason.TOO_LARGE, f"{width}×{height}, the limit is {max_pixels} pixels"
                )
            shown = ImageOps.exif_transpose(picture).convert("RGB")
    except UnidentifiedImageError as error:
        raise BadMediaError(BadReason.NOT_A_VIDEO, "no picture of a known kind") from error
    # What Pillow raises for broken content differs by format.
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise BadMediaError(BadReason.UNDECODABLE, str(error)[:200]) from error
    return np.asarray(shown)[None].copy()
