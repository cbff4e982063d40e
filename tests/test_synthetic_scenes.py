"""What a synthetic clip shows: the label is in the motion, and only there."""

from dataclasses import replace
from io import BytesIO
from itertools import pairwise

import av
import numpy as np
import pytest
from av.video.stream import VideoStream

from data_prep.synthetic.classes import PAIRS, Pair, bare, class_numbers
from data_prep.synthetic.encode import encode_h264
from data_prep.synthetic.knobs import ClipShape, Knobs
from data_prep.synthetic.motions import MOTIONS
from data_prep.synthetic.render import render
from data_prep.synthetic.scene import Scene, class_of, compose, draw_scene

SHAPE = ClipShape(size=112, seconds=2.5, fps=12, difficulty=0.3)
SMALL = ClipShape(size=48, seconds=1.5, fps=8, difficulty=0.6)
MOTION_NAMES = [pair.motion for pair in PAIRS]


def scene_of(pair: Pair, backward: bool, number: int, shape: ClipShape = SHAPE) -> Scene:
    return compose(np.random.default_rng([7, number]), pair, backward, shape)


def decoded(payload: bytes) -> np.ndarray:
    with av.open(BytesIO(payload)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def affine_flow(frames_THWC: np.ndarray) -> np.ndarray:
    """Least-squares affine motion of the moving pixels, summed over the clip.

    Returns (u, du/dx, du/dy, v, dv/dx, dv/dy) about the moving pixels' centre, weighted by how
    many there are; from brightness constancy Ix·u + Iy·v + It = 0, with nothing of the renderer.
    """
    grey = frames_THWC.astype(np.float32).mean(-1)
    half = grey.shape[1] // 2
    grey = grey.reshape(len(grey), half, 2, half, 2).mean((2, 4))
    for axis in (1, 2, 1, 2):
        grey = (np.roll(grey, 1, axis) + 2 * grey + np.roll(grey, -1, axis)) / 4
    total = np.zeros(6)
    for before, after in pairwise(grey):
        change = after - before
        moving = np.abs(change) > 4
        if moving.sum() < 12:
            continue
        down, right = np.gradient((before + after) / 2)
        y, x = (place - place.mean() for place in np.nonzero(moving))
        spread = max(1.0, float(np.sqrt((x**2 + y**2).mean())))
        x, y = x / spread, y / spread
        slopes = [right[moving], down[moving]]
        design = np.stack([slope * term for slope in slopes for term in (1, x, y)], axis=1)
        normal = design.T @ design + 0.1 * len(x) * np.eye(6)
        total += np.linalg.solve(normal, -design.T @ change[moving]) * len(x)
    return total


def shows_at_start(scene: Scene, frames_THWC: np.ndarray) -> bool:
    """True if the lesser of two objects is seen where it starts in the first frame, not the last.

    Covering and slipping away have no net flow; that the object is gone at the end is their sense.
    """
    lesser = scene.layers[-2]
    alone = render(replace(scene, layers=(lesser,), backward=False), SHAPE)[0].astype(float)
    side, reach = SHAPE.size, 0.5 * lesser.track.size_x[0]
    rows = (np.arange(side) + 0.5) / side - lesser.track.y[0]
    columns = (np.arange(side) + 0.5) / side - lesser.track.x[0]
    there = np.hypot(rows[:, None], columns[None, :]) < reach
    first, last = (np.abs(frame - alone)[there].mean() for frame in frames_THWC[[0, -1]])
    return bool(first < last)


def looks_forward(scene: Scene, frames_THWC: np.ndarray) -> bool:
    """Tell a pair's two classes apart by looking at the pixels."""
    if scene.pair.motion in ("cover", "slip"):
        return shows_at_start(scene, frames_THWC)
    u, du_dx, du_dy, v, dv_dx, dv_dy = affine_flow(frames_THWC)
    sign = {
        "slide": u,
        "rise": -v,
        "approach": du_dx + dv_dy,
        "spin": dv_dx - du_dy,  # y points down, so a positive curl is clockwise
        "spread": du_dx + dv_dy,
        "swing": -v,
        "topple": v,
        "squash": v,
    }
    return bool(sign[scene.pair.motion] > 0)


@pytest.mark.parametrize("pair", PAIRS, ids=MOTION_NAMES)
def test_the_label_is_what_optical_flow_sees_in_the_encoded_file(pair: Pair) -> None:
    right = 0
    for number in range(8):
        backward = number % 2 == 1
        scene = scene_of(pair, backward, number)
        frames = decoded(encode_h264(render(scene, SHAPE), SHAPE.fps))
        right += looks_forward(scene, frames) != backward
    assert right >= 7


@pytest.mark.parametrize("pair", PAIRS, ids=MOTION_NAMES)
def test_the_classes_of_a_pair_are_one_clip_in_both_directions_of_time(pair: Pair) -> None:
    forward = render(scene_of(pair, False, 3, SMALL), SMALL)
    backward = render(scene_of(pair, True, 3, SMALL), SMALL)
    np.testing.assert_array_equal(backward, forward[::-1])
    moved = np.abs(forward[0].astype(int) - forward[-1].astype(int)).max()
    assert moved > 50


def test_single_frames_do_not_tell_the_classes_of_a_pair_apart() -> None:
    """Mean and spread of each colour of a random frame: no class of a pair has more of either."""
    worst = 0.0
    for index, pair in enumerate(PAIRS):
        rng = np.random.default_rng(index)
        features = {False: [], True: []}
        for number in range(60):
            backward = number % 2 == 1
            frames = render(scene_of(pair, backward, 1000 * index + number, SMALL), SMALL)
            frame = frames[rng.integers(len(frames))].reshape(-1, 3).astype(float)
            features[backward].append(np.concatenate([frame.mean(0), frame.std(0)]))
        one, other = np.array(features[False]), np.array(features[True])
        error = np.sqrt(one.var(0) / len(one) + other.var(0) / len(other))
        worst = max(worst, float(np.abs((one.mean(0) - other.mean(0)) / error).max()))
    # The largest of 60 statistics of pure chance; 3.9 is passed once in a hundred draws.
    assert worst < 3.9


def test_what_surrounds_the_action_has_the_same_law_backwards() -> None:
    shape = replace(SHAPE, difficulty=1.0)
    scenes = [compose(np.random.default_rng(n), PAIRS[0], False, shape) for n in range(1500)]
    cameras = [scene.camera for scene in scenes]
    for drift in (
        np.array([camera.pan_x[-1] - camera.pan_x[0] for camera in cameras]),
        np.array([camera.pan_y[-1] - camera.pan_y[0] for camera in cameras]),
        np.array([np.log(camera.zoom[-1] / camera.zoom[0]) for camera in cameras]),
        np.array([camera.shake_x[-1] - camera.shake_x[0] for camera in cameras]),
        np.array([camera.brightness[-1] - camera.brightness[0] for camera in cameras]),
    ):
        assert drift.std() > 0.005
        assert abs(drift.mean()) < 4 * drift.std() / np.sqrt(len(drift))


def test_the_easing_of_the_action_does_not_tell_its_direction() -> None:
    scenes = [compose(np.random.default_rng(n), PAIRS[0], False, SHAPE) for n in range(2000)]
    x = np.array([scene.layers[-1].track.x for scene in scenes])
    progress = (x - x[:, :1]) / (x[:, -1:] - x[:, :1])
    mirrored = 1 - progress[:, ::-1]
    np.testing.assert_allclose(progress.mean(0), mirrored.mean(0), atol=0.02)
    np.testing.assert_allclose(progress.std(0), mirrored.std(0), atol=0.02)


def test_the_number_of_objects_does_not_tell_one_actor_from_two() -> None:
    shape = replace(SHAPE, difficulty=0.5)
    counts = {
        motion: np.bincount(
            [
                len(compose(np.random.default_rng([n, k]), pair, False, shape).layers)
                for n in range(240)
            ],
            minlength=6,
        )
        for k, (motion, pair) in enumerate((pair.motion, pair) for pair in PAIRS)
    }
    for motion, count in counts.items():
        # 240 draws over three equally likely counts: a standard deviation of 7.3.
        np.testing.assert_allclose(count[2:5], [240 / 3] * 3, atol=30, err_msg=motion)


def test_a_clip_depends_on_nothing_but_seed_and_number() -> None:
    once, again = (render(draw_scene(3, 11, 10, SMALL), SMALL) for _ in range(2))
    np.testing.assert_array_equal(once, again)
    assert encode_h264(once, 8) == encode_h264(again, 8)
    other_seed = render(draw_scene(4, 11, 10, SMALL), SMALL)
    other_number = render(draw_scene(3, 12, 10, SMALL), SMALL)
    assert (once != other_seed).mean() > 0.5
    assert (once != other_number).mean() > 0.5


@pytest.mark.parametrize("num_pairs", [1, 6, 10])
def test_every_run_of_videos_has_each_class_once(num_pairs: int) -> None:
    num_classes = 2 * num_pairs
    classes = np.array([class_of(0, video, num_pairs) for video in range(1, 1 + num_classes * 5)])
    for block in classes.reshape(5, num_classes):
        assert sorted(block) == list(range(num_classes))


def test_the_drawn_scene_has_the_class_its_number_is_given() -> None:
    numbers = class_numbers(10)
    for video in range(1, 41):
        scene = draw_scene(2, video, 10, SMALL)
        assert numbers[bare(scene.template)] == class_of(2, video, 10)
        assert scene.template.count("[something]") == len(scene.placeholders)
        assert "[" not in scene.sentence


def test_every_pair_has_a_motion_of_its_own_and_wording_of_its_own() -> None:
    assert {pair.motion for pair in PAIRS} == set(MOTIONS)
    assert len(class_numbers(len(PAIRS))) == 2 * len(PAIRS)


def test_difficulty_makes_objects_smaller_and_surroundings_livelier() -> None:
    easy, hard = Knobs.at(0.0), Knobs.at(1.0)
    assert hard.travel[1] < easy.travel[1]
    assert hard.size[0] < easy.size[0]
    assert easy.shake == easy.pan == easy.zoom == easy.wobble == 0
    assert min(hard.shake, hard.pan, hard.zoom, hard.wobble) > 0
    still = render(scene_of(PAIRS[0], False, 1, replace(SMALL, difficulty=0.0)), SMALL)
    corner = still[:, :4, :4].astype(int)
    assert np.abs(corner - corner[0]).max() == 0


def test_clips_are_h264_that_shards_can_take_as_it_is() -> None:
    payload = encode_h264(render(draw_scene(0, 1, 6, SHAPE), SHAPE), SHAPE.fps)
    with av.open(BytesIO(payload)) as container:
        stream = container.streams.video[0]
        assert isinstance(stream, VideoStream)
        frames = list(container.decode(stream))
        assert stream.codec_context.name == "h264"
        assert frames[0].format.name == "yuv420p"
        assert [frame.time for frame in frames] == pytest.approx(SHAPE.times().tolist(), abs=1e-4)
        assert not any(frame.pict_type == av.video.frame.PictureType.B for frame in frames)
        assert [i for i, frame in enumerate(frames) if frame.key_frame] == [0, 16]


def test_encoding_keeps_the_picture() -> None:
    frames = render(draw_scene(0, 2, 6, SHAPE), SHAPE)
    error = decoded(encode_h264(frames, SHAPE.fps)).astype(float) - frames
    assert 10 * np.log10(255**2 / (error**2).mean()) > 25
