import math
import random
import subprocess
import sys

import numpy as np
import pytest
import torch

from pipeline.data.augment import (
    CropBox,
    CropSpec,
    crop,
    evaluation_views,
    normalise,
    random_box,
)

SPEC = CropSpec(scale=(0.3, 1.0), aspect_ratio=(0.75, 1.35), horizontal_flip=0.5)
HEIGHT, WIDTH = 90, 160


def picture(height: int = HEIGHT, width: int = WIDTH, frames: int = 3) -> np.ndarray:
    """Smooth and different along every axis."""
    t, y, x = np.meshgrid(np.arange(frames), np.arange(height), np.arange(width), indexing="ij")
    channels = [20 * t + y % 90, x % 200 + 10 * t, (x + y) % 240]
    return np.stack(channels, axis=-1).astype(np.uint8)


def box(position: int, spec: CropSpec = SPEC, **size: int) -> CropBox:
    size = {"height": HEIGHT, "width": WIDTH, **size}
    return random_box(spec, seed=3, position=position, **size)


def test_boxes_lie_in_the_picture_and_keep_scale_and_ratio():
    for position in range(300):
        cut = box(position)
        assert 0 <= cut.top <= HEIGHT - cut.height
        assert 0 <= cut.left <= WIDTH - cut.width
        assert 0.72 <= cut.width / cut.height <= 1.39  # whole pixels
        assert 0.29 <= cut.width * cut.height / (HEIGHT * WIDTH) <= 1.01


def reference_area(generator: random.Random, size: int) -> float:
    """Area of one box as the released loader draws it, for a square picture."""
    for _ in range(10):
        area = generator.uniform(0.3, 1.0) * size * size
        ratio = math.exp(generator.uniform(math.log(0.75), math.log(1.35)))
        width, height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if width <= size and height <= size:
            return width * height / size**2
    return 1.0


def test_boxes_are_distributed_as_the_released_loaders_and_half_are_mirrored():
    boxes = [box(position, height=400, width=400) for position in range(2000)]
    areas = [cut.height * cut.width / 160_000 for cut in boxes]
    generator = random.Random(0)
    expected = [reference_area(generator, 400) for _ in range(2000)]
    for share in (0.1, 0.5, 0.9):
        assert np.quantile(areas, share) == pytest.approx(np.quantile(expected, share), abs=0.03)
    lefts = [cut.left / (400 - cut.width) for cut in boxes if cut.width < 390]
    assert np.mean(lefts) == pytest.approx(0.5, abs=0.04)
    assert np.mean([cut.flip for cut in boxes]) == pytest.approx(0.5, abs=0.04)


def test_a_box_depends_on_seed_and_position_alone():
    assert box(5) == box(5)
    assert box(5) != box(6)
    assert box(5) != random_box(SPEC, height=HEIGHT, width=WIDTH, seed=4, position=5)


def test_no_clip_is_mirrored_where_left_and_right_are_to_be_learnt():
    never = CropSpec(scale=(0.3, 1.0), aspect_ratio=(0.75, 1.35), horizontal_flip=0.0)
    always = CropSpec(scale=(0.3, 1.0), aspect_ratio=(0.75, 1.35), horizontal_flip=1.0)
    assert not any(box(position, never).flip for position in range(200))
    assert all(box(position, always).flip for position in range(200))


@pytest.mark.parametrize(
    ("height", "width", "expected"), [(20, 400, (20, 27)), (400, 20, (27, 20))]
)
def test_a_picture_no_box_fits_into_gives_the_largest_centred_one(height, width, expected):
    cut = box(1, height=height, width=width)
    assert (cut.height, cut.width) == expected
    assert abs(2 * cut.top + cut.height - height) <= 1
    assert abs(2 * cut.left + cut.width - width) <= 1


@pytest.mark.parametrize("antialias", [False, True])
def test_a_crop_is_the_float_interpolation_up_to_rounding(antialias):
    frames = picture()
    cut = CropBox(top=7, left=30, height=70, width=80, flip=False)
    floats = torch.from_numpy(frames).permute(3, 0, 1, 2)[:, :, 7:77, 30:110].float()
    expected = torch.nn.functional.interpolate(
        floats, size=(32, 32), mode="bilinear", align_corners=False, antialias=antialias
    )
    video = crop(frames, cut, 32, antialias=antialias)
    assert video.dtype == torch.uint8
    assert video.shape == (3, 3, 32, 32)
    difference = video.float() - expected
    assert difference.abs().max() < 1.0
    assert difference.mean().abs() < 0.1


def test_a_mirrored_crop_is_the_crop_read_from_right_to_left():
    plain = CropBox(top=7, left=30, height=70, width=80, flip=False)
    mirrored = CropBox(top=7, left=30, height=70, width=80, flip=True)
    one = crop(picture(), plain, 32, antialias=False)
    other = crop(picture(), mirrored, 32, antialias=False)
    assert torch.equal(other, one.flip(-1))
    assert not torch.equal(other, one)


def test_normalising_gives_the_published_mean_and_deviation():
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1, 1)
    deviation = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1, 1)
    video = torch.randint(0, 256, (2, 3, 4, 8, 8), dtype=torch.uint8)
    expected = (video.double() / 255 - mean) / deviation
    torch.testing.assert_close(normalise(video), expected.float())
    assert normalise(video, dtype=torch.bfloat16).dtype == torch.bfloat16
    assert video.dtype == torch.uint8


def test_one_view_is_the_centre_of_the_resized_picture():
    frames = picture(96, 160)
    frames[:, :, :40] = 0
    (view,) = evaluation_views(frames, 56)
    assert view.shape == (3, 3, 56, 56)
    # Short side 64: the picture is 64 × 107 and the centre begins at column 25.5, of 40 source
    # columns at 2/3 scale the first 26.7 are black.
    assert view[:, :, :, 0].max() < 60
    assert view[:, :, :, 8:].float().mean() > 40


def test_three_views_span_the_long_side_from_edge_to_edge():
    for frames in (picture(64, 160), picture(160, 64)):
        views = evaluation_views(frames, 64, 3)
        whole = torch.from_numpy(frames).permute(3, 0, 1, 2)
        whole = whole if whole.shape[-1] == 160 else whole.transpose(-1, -2)
        for view, start in zip(views, (0, 48, 96), strict=True):
            upright = view if frames.shape[2] == 160 else view.transpose(-1, -2)
            assert torch.equal(upright, whole[..., start : start + 64])


def test_torchvision_is_imported_by_the_first_crop_and_not_before():
    code = (
        "import sys, pipeline.data.augment as a; assert 'torchvision' not in sys.modules;"
        "a.transforms(); import torchvision.transforms.v2; assert 'torchvision' in sys.modules"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, timeout=120)


def test_threads_that_all_need_the_transforms_first_get_the_same_module():
    program = """
import sys, threading
sys.setswitchinterval(1e-6)
from concurrent.futures import ThreadPoolExecutor
from pipeline.data.augment import transforms
start = threading.Barrier(8)
def first(_):
    start.wait()
    return transforms()
with ThreadPoolExecutor(8) as threads:
    found = list(threads.map(first, range(8)))
assert len(set(map(id, found))) == 1
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", program], check=True, timeout=120)
