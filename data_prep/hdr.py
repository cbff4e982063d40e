"""High dynamic range (PQ and HLG of BT.2100) → the 8 bits of an ordinary picture.

Without this, bright wide-gamut video comes out grey and flat. Light as the display shows it is
computed from the code values, its diffuse white (203 cd/m², BT.2408) becomes nearly full
brightness, highlights up to 1,000 cd/m² are compressed above a knee so that mid-tones stay as
they are, and primaries go from BT.2020 to BT.709.
"""

import numpy as np
from av.video.frame import VideoFrame
from av.video.reformatter import ColorTrc

_WHITE_NITS = 203.0
_PEAK_NITS = 1000.0
_KNEE = 0.7
_DISPLAY_GAMMA = 2.4
# ITU-R BT.2087, section 4: linear BT.2020 → linear BT.709.
_TO_BT709 = np.array(
    [[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]],
    dtype=np.float32,
)
# ITU-R BT.2020: share of each primary in the luminance.
_LUMINANCE = np.array([0.2627, 0.6780, 0.0593], dtype=np.float32)


def is_hdr(frame: VideoFrame) -> bool:
    """Whether a frame's code values are those of PQ or HLG."""
    return frame.color_trc in (ColorTrc.SMPTE2084, ColorTrc.ARIB_STD_B67)


def tone_mapped(frame: VideoFrame, width: int, height: int) -> np.ndarray:
    """An HDR frame as stored (not turned), scaled, as uint8 RGB [H, W, 3] of BT.709."""
    scaled = frame.reformat(width=width, height=height, format="rgb48le", threads=1)
    code: np.ndarray = scaled.to_ndarray()
    hlg = frame.color_trc == ColorTrc.ARIB_STD_B67
    light = _shown_by_hlg(_HLG_TABLE[code]) if hlg else _PQ_TABLE[code]
    linear = np.clip((light / np.float32(_WHITE_NITS)) @ _TO_BT709.T, 0, None)
    # By the strongest colour, so that hues stay.
    strongest = linear.max(axis=-1, keepdims=True)
    linear *= _compressed(strongest) / np.maximum(strongest, np.float32(1e-6))
    shown = np.clip(linear, 0, 1) ** np.float32(1 / _DISPLAY_GAMMA)
    return np.rint(shown * 255).astype(np.uint8)


def _compressed(light: np.ndarray) -> np.ndarray:
    """Itself below the knee, then ever flatter; the peak becomes 1."""
    over = np.maximum(light - np.float32(_KNEE), 0) / np.float32(1 - _KNEE)
    peak = np.float32((_PEAK_NITS / _WHITE_NITS - _KNEE) / (1 - _KNEE))
    flat = np.float32(_KNEE) + np.float32(1 - _KNEE) * over * (1 + over / peak**2) / (1 + over)
    return np.where(light <= _KNEE, light, np.minimum(flat, 1))


def _shown_by_hlg(scene: np.ndarray) -> np.ndarray:
    """Light of the scene (0 to 1) → cd/m² of a display of 1,000; BT.2100, table 5."""
    luminance = np.maximum(scene @ _LUMINANCE, np.float32(1e-6))[..., None]
    return np.float32(_PEAK_NITS) * luminance ** np.float32(0.2) * scene


def _pq_table() -> np.ndarray:
    """Code value of 16 bits → cd/m²; SMPTE ST 2084."""
    root = (np.arange(65536) / 65535) ** (1 / 78.84375)
    share = np.maximum(root - 0.8359375, 0) / (18.8515625 - 18.6875 * root)
    return (10000 * share ** (1 / 0.1593017578125)).astype(np.float32)


def _hlg_table() -> np.ndarray:
    """Code value of 16 bits → light of the scene, 0 to 1; BT.2100, table 5."""
    code = np.arange(65536) / 65535
    bright = (np.exp((code - 0.55991073) / 0.17883277) + 0.28466892) / 12
    return np.where(code <= 0.5, code**2 / 3, bright).astype(np.float32)


_PQ_TABLE, _HLG_TABLE = _pq_table(), _hlg_table()
