"""RandAugment: what every operation does to known pictures, and that a whole clip is one draw."""

import numpy as np
import pytest
import torch

from pipeline.probe.randaugment import OPERATIONS, rand_augment
from pipeline.probe.tasks import RandAugment

ALWAYS = RandAugment(probability=1.0, deviation=0.0)


def picture(height=24, width=40):
    """Noise whose colours differ, uint8 [1, C, H, W]."""
    values = np.random.default_rng(0).integers(30, 200, (1, 3, height, width), dtype=np.uint8)
    return torch.from_numpy(values)


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_keeps_shape_and_kind_at_both_ends_of_its_strength(name):
    frames_TCHW = picture().repeat(2, 1, 1, 1)
    for strength in (0.0, 1.0):
        changed = OPERATIONS[name](frames_TCHW, strength, -1.0)
        assert (changed.shape, changed.dtype) == (frames_TCHW.shape, torch.uint8)
        assert torch.equal(changed[0], changed[1])


STILL_AT_NOTHING = {"autocontrast", "equalize", "invert", "posterize"}


@pytest.mark.parametrize("name", sorted(set(OPERATIONS) - STILL_AT_NOTHING))
def test_an_operation_changes_nothing_without_strength_and_something_with_it(name):
    frames_TCHW = picture()

    assert torch.equal(OPERATIONS[name](frames_TCHW, 0.0, 1.0), frames_TCHW)
    assert not torch.equal(OPERATIONS[name](frames_TCHW, 0.7, 1.0), frames_TCHW)


def test_operations_do_what_their_formulas_say():
    x = picture()
    assert torch.equal(OPERATIONS["invert"](x, 1.0, 1.0), 255 - x)
    assert torch.equal(OPERATIONS["posterize"](x, 0.7, 1.0), x & 0b11000000)
    assert torch.equal(OPERATIONS["solarize"](x, 0.5, 1.0), torch.where(x >= 128, 255 - x, x))
    added = OPERATIONS["solarize-add"](x, 0.7, 1.0)
    assert torch.equal(added, torch.where(x < 128, x + 77, x))
    brighter = (x.float() * 1.63).clamp(max=255).to(torch.uint8)
    torch.testing.assert_close(OPERATIONS["brightness"](x, 0.7, 1.0), brighter, atol=1, rtol=0)
    right = OPERATIONS["shift-x"](x, 0.5, 1.0)  # 0.45 · 0.5 · 40 pixels
    assert torch.equal(right[..., 9:], x[..., :-9])
    assert (right[..., :9] == 128).all()
    down = OPERATIONS["shift-y"](x, 5 / 9, 1.0)  # 0.45 · 5/9 · 24 pixels
    assert torch.equal(down[..., 6:, :], x[..., :-6, :])
    sheared = OPERATIONS["shear-x"](x, 1.0, 1.0)
    grey = (sheared == 128).all(dim=1)[0].sum(dim=1).tolist()
    assert (grey[0], grey[-1]) == (0, 7), "0.3 of a pixel a row, from the upper edge down"


def test_a_clip_is_one_draw_of_its_generator_for_all_frames():
    frames_THWC = np.repeat(picture().permute(0, 2, 3, 1).numpy(), 3, axis=0)
    found = [rand_augment(frames_THWC, ALWAYS, np.random.default_rng(s)) for s in (5, 5, 6)]
    assert np.array_equal(found[0], found[1])
    assert not np.array_equal(found[0], found[2])
    assert all(np.array_equal(clip[0], frame) for clip in found for frame in clip)
    assert found[0].dtype == np.uint8
    never = ALWAYS.model_copy(update={"probability": 0.0})
    assert np.array_equal(rand_augment(frames_THWC, never, np.random.default_rng(5)), frames_THWC)


def test_operations_are_drawn_alike_and_carried_out_as_often_as_asked(monkeypatch):
    done = dict.fromkeys(OPERATIONS, 0)
    strengths = []

    def counted(name):
        def count(frames, strength, sign):
            done[name] += 1
            strengths.append(strength * sign)
            return frames

        return count

    monkeypatch.setattr(
        "pipeline.probe.randaugment.OPERATIONS", {name: counted(name) for name in OPERATIONS}
    )
    frames_THWC, generator = np.zeros((1, 2, 2, 3), np.uint8), np.random.default_rng(1)
    for _ in range(3000):
        rand_augment(frames_THWC, RandAugment(), generator)
    # 3000 · 4 · 0.5 in all; binomial deviations are 55 of all and 19 of one.
    assert sum(done.values()) == pytest.approx(6000, abs=4 * 55)
    assert all(count == pytest.approx(400, abs=5 * 19) for count in done.values())
    assert np.mean(np.abs(strengths)) == pytest.approx(0.7, abs=0.01)
    assert np.std(np.abs(strengths)) == pytest.approx(0.05, abs=0.01)
    assert abs(np.mean(np.sign(strengths))) < 0.06
