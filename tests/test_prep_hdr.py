"""PQ and HLG come out at the levels that the standards and the stated curve give."""

import av
import numpy as np
import pytest
from av.video.reformatter import ColorRange, ColorTrc

from data_prep.hdr import is_hdr, tone_mapped

PATCH = 64
BT2020 = 9


def pq_code(nits: float) -> float:
    """SMPTE ST 2084, the inverse direction of the table under test."""
    light = (nits / 10000) ** 0.1593017578125
    return ((0.8359375 + 18.8515625 * light) / (1 + 18.6875 * light)) ** 78.84375


def patches(codes: list[float], transfer: ColorTrc, chroma: int = 512) -> av.VideoFrame:
    """Patches beside one another, 10 bits of limited range as HEVC has them."""
    frame = av.VideoFrame(PATCH * len(codes), PATCH, "yuv420p10le")
    luma, *chromas = (np.frombuffer(memoryview(plane), np.uint16) for plane in frame.planes)
    row = np.repeat([round(64 + 876 * code) for code in codes], PATCH)
    luma.reshape(PATCH, -1)[:, : len(row)] = row
    for plane in chromas:
        plane[:] = chroma
    frame.color_trc, frame.color_range = transfer, ColorRange.MPEG
    frame.colorspace = frame.color_primaries = BT2020
    return frame


def shown(frame: av.VideoFrame) -> np.ndarray:
    return tone_mapped(frame, frame.width, frame.height)[PATCH // 2, PATCH // 2 :: PATCH]


def test_pq_keeps_mid_tones_and_compresses_highlights() -> None:
    nits = [1.0, 20.0, 50.0, 100.0, 203.0, 400.0, 1000.0, 4000.0]
    frame = patches([pq_code(n) for n in nits], ColorTrc.SMPTE2084)
    assert is_hdr(frame)
    levels = shown(frame).astype(int)
    assert np.ptp(levels, axis=1).max() <= 1
    # Below the knee at 142 cd/m² the display's gamma alone is at work.
    expected = 255 * (np.array(nits[:4]) / 203) ** (1 / 2.4)
    np.testing.assert_allclose(levels[:4, 0], expected, atol=3)
    assert (np.diff(levels[:, 0]) >= 0).all()
    assert 225 < levels[4, 0] < 245
    assert levels[6:, 0].tolist() == [255, 255]


def test_hlg_follows_its_curve() -> None:
    frame = patches([0.25, 0.5, 0.75, 1.0], ColorTrc.ARIB_STD_B67)
    levels = shown(frame).astype(int)
    # BT.2100: a quarter of the signal is 1/48 of the scene's light, a half is 1/12.
    nits = np.array([1 / 48, 1 / 12]) ** 1.2 * 1000
    np.testing.assert_allclose(levels[:2, 0], 255 * (nits / 203) ** (1 / 2.4), atol=3)
    assert 230 < levels[2, 0] < 245
    assert levels[3, 0] >= 254


def test_wide_colours_are_moved_to_ordinary_primaries() -> None:
    """BT.2020 colours have less chroma than their code values would show as BT.709."""
    frame = patches([pq_code(60.0)], ColorTrc.SMPTE2084, chroma=470)
    low, middle, high = sorted(int(value) for value in shown(frame)[0])
    assert low < middle < high
    assert shown(frame)[0].argmax() == 1


@pytest.mark.parametrize("transfer", [ColorTrc.BT709, ColorTrc.UNSPECIFIED])
def test_ordinary_video_is_not_touched(transfer: ColorTrc) -> None:
    assert not is_hdr(patches([0.5], transfer))
