"""Augmentation moves picture and labels together, invents no label, and is the cheap form of scale-then-crop."""

import sys
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from deeplabzoo.data import transforms
from deeplabzoo.data.dataset import Sample
from deeplabzoo.data.transforms import Augmentation, _color_jitter, augment
from deeplabzoo.errors import UsageError

FILL = (124, 116, 104)
IGNORE = 255


def made_sample(height: int, width: int, seed: int = 0) -> Sample:
    """Coarse noise enlarged: edges and slopes, as in a photo, at any size."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (max(2, height // 6), max(2, width // 6), 3), dtype=np.uint8)
    image = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))
    return Sample(image, rng.choice([0, 3, 7, IGNORE], (height, width)).astype(np.uint8), "made")


def run(sample: Sample, augmentation: Augmentation, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    return augment(sample, augmentation, np.random.default_rng(seed), mean_fill=FILL, ignore_index=IGNORE)


sides = st.integers(1, 70)
augmentations = st.builds(
    Augmentation,
    crop=st.tuples(st.integers(1, 48), st.integers(1, 48)),
    scale=st.tuples(st.floats(0.1, 1), st.floats(1, 3)),
    flip=st.floats(0, 1),
    colour=st.floats(0, 1),
    blur=st.floats(0, 1),
)


@settings(max_examples=150, deadline=None)
@given(sides, sides, augmentations, st.integers(0, 2**32))
def test_any_sample_gives_the_exact_size_and_only_known_labels(height, width, augmentation, seed) -> None:
    """A loss on the GPU never meets a label that was not in the file (meetps/pytorch-semseg#158)."""
    sample = made_sample(height, width)
    image, labels = run(sample, augmentation, seed)
    assert image.shape == (*augmentation.crop, 3)
    assert image.dtype == np.uint8
    assert labels.shape == augmentation.crop
    assert labels.dtype == np.uint8
    assert set(np.unique(labels)) <= set(np.unique(sample.labels)) | {IGNORE}
    assert image.flags.c_contiguous
    assert labels.flags.c_contiguous


@settings(max_examples=100, deadline=None)
@given(sides, sides, augmentations, st.integers(0, 2**32))
def test_the_same_generator_gives_the_same_sample(height, width, augmentation, seed) -> None:
    """What a worker draws depends on its generator alone, so the number of workers cannot change a run."""
    first, second = (run(made_sample(height, width), augmentation, seed) for _ in range(2))
    np.testing.assert_array_equal(first[0], second[0])
    np.testing.assert_array_equal(first[1], second[1])


@settings(max_examples=100, deadline=None)
@given(sides, sides, augmentations, st.integers(0, 2**32))
def test_colour_and_blur_leave_labels_alone(height, width, augmentation, seed) -> None:
    sample = made_sample(height, width)
    _, plain = run(sample, replace(augmentation, colour=0.0, blur=0.0), seed)
    _, painted = run(sample, replace(augmentation, colour=1.0, blur=1.0), seed)
    np.testing.assert_array_equal(plain, painted)


@settings(max_examples=100, deadline=None)
@given(sides, sides, augmentations, st.integers(0, 2**32))
def test_a_flip_mirrors_image_and_labels_together(height, width, augmentation, seed) -> None:
    sample = made_sample(height, width)
    ahead = run(sample, replace(augmentation, flip=0.0, colour=0.0, blur=0.0), seed)
    mirrored = run(sample, replace(augmentation, flip=1.0, colour=0.0, blur=0.0), seed)
    real = kept_width(ahead, mirrored)
    for one, other in zip(ahead, mirrored, strict=True):
        np.testing.assert_array_equal(one[:, :real], other[:, :real][:, ::-1])
        np.testing.assert_array_equal(one[:, real:], other[:, real:])


def kept_width(ahead: tuple[np.ndarray, np.ndarray], mirrored: tuple[np.ndarray, np.ndarray]) -> int:
    """The widest part whose mirror image is the other one; what is right of it is padding."""
    for width in range(ahead[1].shape[1], 0, -1):
        if np.array_equal(ahead[0][:, :width], mirrored[0][:, :width][:, ::-1]):
            return width
    raise AssertionError("no part of the one picture is the mirror image of the other")


def test_labels_stay_on_their_pixels() -> None:
    """Where the labels are drawn in the picture, they are still drawn there after any augmentation without colour."""
    labels = np.zeros((90, 120), np.uint8)
    labels[20:70, 30:100] = 1
    sample = Sample(np.repeat(labels[:, :, None] * 200, 3, axis=2), labels, "made")
    for seed in range(30):
        image, moved = run(sample, Augmentation(crop=(64, 64)), seed)
        seen = (image[..., 0] > 100) & (moved != IGNORE)
        assert np.mean((seen != (moved == 1))[moved != IGNORE]) < 0.035


@pytest.mark.parametrize("size", [(90, 140), (375, 500)])
@pytest.mark.parametrize("crop", [(64, 64), (97, 61)])
def test_cropping_first_equals_scaling_first(size, crop) -> None:
    """speed.md, section 3: the box resize is the whole resize, within one level of 255 (rounding of the box's corners)."""
    sample = made_sample(*size)
    off_by_one = total = 0
    for seed in range(12):
        augmentation = Augmentation(crop=crop, flip=0.0)
        image, labels = run(sample, augmentation, seed)
        expected_image, expected_labels, decided = scale_then_crop(sample, augmentation, seed)
        difference = np.abs(image.astype(int) - expected_image)
        assert difference.max() <= 1
        off_by_one += np.count_nonzero(difference)
        total += difference.size
        assert decided.mean() > 0.9
        np.testing.assert_array_equal(labels[decided], expected_labels[decided])
    assert off_by_one / total < 0.005


def scale_then_crop(sample: Sample, augmentation: Augmentation, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The slow form, as torchvision's reference training does it: the whole picture resized by Pillow, padded, cropped.

    Also where the nearest label is decided: where a centre falls on the line between two source pixels, Pillow's
    rounding of summed-up floats picks either.
    """
    u_scale, u_top, u_left = np.random.default_rng(seed).random(10)[:3].tolist()
    low, high = augmentation.scale
    scale = low + (high - low) * u_scale
    height, width = (round(side * scale) for side in sample.labels.shape)
    image = Image.fromarray(sample.image).resize((width, height), Image.Resampling.BILINEAR)
    labels = Image.fromarray(sample.labels).resize((width, height), Image.Resampling.NEAREST)
    crop_height, crop_width = augmentation.crop
    top = int(u_top * max(1, height - crop_height + 1))
    left = int(u_left * max(1, width - crop_width + 1))
    canvas = Image.new("RGB", (max(width, crop_width), max(height, crop_height)), FILL)
    canvas.paste(image)
    label_canvas = Image.new("L", canvas.size, IGNORE)
    label_canvas.paste(labels)
    box = (left, top, left + crop_width, top + crop_height)
    rows, columns = (
        ((2 * np.arange(start, start + kept) + 1) * size) % (2 * scaled) != 0
        for start, kept, size, scaled in zip((top, left), augmentation.crop, sample.labels.shape, (height, width), strict=True)
    )
    return np.asarray(canvas.crop(box)), np.asarray(label_canvas.crop(box)), rows[:, None] & columns


def test_the_oracle_of_torchvision_agrees() -> None:
    """The same pixels as torchvision v2's antialiased resize and crop of a tensor, to 2 levels of 255."""
    import torch
    from torchvision.transforms.v2 import functional

    sample = made_sample(120, 90)
    whole = functional.resize(torch.from_numpy(sample.image.copy()).permute(2, 0, 1), [84, 63], antialias=True)
    image, _ = run(sample, Augmentation(crop=(84, 63), scale=(0.7, 0.7), flip=0.0))
    assert np.abs(image.astype(int) - whole.permute(1, 2, 0).numpy()).max() <= 2


def test_without_augmentation_the_sample_comes_back() -> None:
    sample = made_sample(40, 50)
    image, labels = run(sample, Augmentation(crop=(40, 50), scale=(1.0, 1.0), flip=0.0))
    np.testing.assert_array_equal(image, sample.image)
    np.testing.assert_array_equal(labels, sample.labels)


def test_padding_is_the_mean_colour_and_ignored() -> None:
    """Padding lies at the bottom and right as at evaluation, never counts, and no colour change touches it."""
    sample = made_sample(20, 30)
    image, labels = run(sample, Augmentation(crop=(32, 32), scale=(1.0, 1.0), flip=1.0, colour=1.0, blur=1.0))
    assert (image[20:] == FILL).all()
    assert (image[:, 30:] == FILL).all()
    assert (labels[20:] == IGNORE).all()
    assert (labels[:, 30:] == IGNORE).all()
    np.testing.assert_array_equal(labels[:20, :30], sample.labels[:, ::-1])


def test_an_ignore_value_beyond_8_bits_is_kept() -> None:
    sample = made_sample(8, 8)
    _, labels = augment(
        sample, Augmentation(crop=(16, 16), scale=(1, 1)), np.random.default_rng(0), mean_fill=FILL, ignore_index=65535
    )
    assert labels.dtype == np.uint16
    assert (labels[8:] == 65535).all()


def test_colour_does_not_move_the_crop() -> None:
    """Each option draws from its own values: a recipe with colour sees the same crops as one without."""
    sample = made_sample(90, 90)
    _, plain = run(sample, Augmentation(crop=(40, 40)), 5)
    image, coloured = run(sample, Augmentation(crop=(40, 40), colour=0.5, blur=1.0), 5)
    np.testing.assert_array_equal(plain, coloured)
    assert not np.array_equal(image, run(sample, Augmentation(crop=(40, 40)), 5)[0])


def test_colour_is_brightness_contrast_saturation_and_hue() -> None:
    """Against each of the four written down for one pixel; torchvision's first three agree within rounding."""
    import torch
    from torchvision.transforms.v2 import functional

    image = made_sample(30, 40).image // 2 + 60  # far enough from 0 and 255 that nothing is clipped
    tensor = torch.from_numpy(image).permute(2, 0, 1)
    oracles = (functional.adjust_brightness, functional.adjust_contrast, functional.adjust_saturation)
    for position, oracle in enumerate(oracles):
        u_colour = [0.5, 0.5, 0.5, 0.5]
        u_colour[position] = 0.8  # 1 + 0.3 * (2 * 0.8 - 1) = 1.18
        ours = np.asarray(_color_jitter(Image.fromarray(image), 0.3, u_colour)).astype(int)
        assert np.abs(ours - oracle(tensor, 1.18).permute(1, 2, 0).numpy()).max() <= 1
    turned = np.asarray(_color_jitter(Image.fromarray(image), 1.0, [0.5, 0.5, 0.5, 1.0])).astype(int)
    assert np.abs(turned - image).max() > 10
    luma = [0.299, 0.587, 0.114]
    assert np.abs(turned @ luma - image @ luma).max() <= 1


def test_a_grey_image_stays_grey() -> None:
    grey = np.repeat(made_sample(20, 20).image[..., :1], 3, axis=2)
    changed = np.asarray(_color_jitter(Image.fromarray(grey), 1.0, [0.6, 0.4, 0.9, 0.1]))
    assert np.ptp(changed.astype(int), axis=2).max() <= 1
    assert not np.array_equal(changed, grey)


@pytest.mark.parametrize(
    "wrong",
    [
        {"crop": (0, 5)},
        {"crop": (5,)},
        {"scale": (2.0, 0.5)},
        {"scale": (0.0, 1.0)},
        {"flip": 1.5},
        {"colour": -0.1},
        {"blur": 2},
    ],
)
def test_senseless_values_are_refused_by_name(wrong) -> None:
    with pytest.raises(UsageError, match=next(iter(wrong))):
        Augmentation(**{"crop": (8, 8)} | wrong)


@st.composite
def windows(draw: st.DrawFn) -> tuple[tuple[int, int], tuple[float, float, float, float], tuple[int, int]]:
    """A picture's size, a window in it that is at least half a pixel wide, and the size that it is brought to."""
    height, width = draw(st.integers(1, 60)), draw(st.integers(1, 60))
    left, top = draw(st.floats(0, width - 0.5)), draw(st.floats(0, height - 0.5))
    right, bottom = draw(st.floats(left + 0.5, width)), draw(st.floats(top + 0.5, height))
    return (height, width), (left, top, right, bottom), (draw(st.integers(1, 50)), draw(st.integers(1, 50)))


@settings(max_examples=200, deadline=None)
@given(windows(), st.booleans(), st.tuples(st.integers(0, 5), st.integers(0, 5)))
def test_compiled_and_pillow_resize_are_the_same_pixels(window, flip, beyond) -> None:
    """A machine without numba trains on the very same pictures: bit for bit, wherever the window lies."""
    hw, box, visible_hw = window
    image = made_sample(*hw).image
    image.flags.writeable = False  # as a picture in a memory map is
    outs = [np.zeros((visible_hw[0] + beyond[0], visible_hw[1] + beyond[1], 3), np.uint8) for _ in range(2)]
    assert transforms.load_kernel() is not None
    transforms.resize_into(outs[0], image, box, visible_hw, flip=flip, fill=FILL)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transforms, "load_kernel", lambda: None)
        transforms.resize_into(outs[1], image, box, visible_hw, flip=flip, fill=FILL)
    np.testing.assert_array_equal(outs[0], outs[1])


@pytest.mark.parametrize("hw", [(375, 500), (500, 333)])
@pytest.mark.parametrize("scale", [0.5, 0.77, 1.0, 1.31, 2.0])
def test_a_window_is_that_of_pillows_whole_resize(hw, scale) -> None:
    """The pixels of torchvision's reference transform (Pillow, whole picture, then crop), but for the rounding of the box."""
    image = made_sample(*hw).image
    height, width = (round(side * scale) for side in hw)
    whole = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))
    top, left = height // 5, width // 3
    visible_hw = (min(height - top, 300), min(width - left, 300))
    box = (
        left * hw[1] / width,
        top * hw[0] / height,
        (left + visible_hw[1]) * hw[1] / width,
        (top + visible_hw[0]) * hw[0] / height,
    )
    out = np.zeros((*visible_hw, 3), np.uint8)
    transforms.resize_into(out, image, box, visible_hw, flip=False, fill=FILL)
    difference = np.abs(out.astype(int) - whole[top : top + visible_hw[0], left : left + visible_hw[1]])
    assert difference.max() <= 1
    assert np.count_nonzero(difference) <= 5e-3 * difference.size


def test_a_missing_numba_is_logged_once(monkeypatch, caplog) -> None:
    """Slower, never silent: one line that names the extra."""
    monkeypatch.setitem(sys.modules, "deeplabzoo.data.resize_numba", None)
    monkeypatch.delattr("deeplabzoo.data.resize_numba", raising=False)
    transforms.load_kernel.cache_clear()
    try:
        assert transforms.load_kernel() is None
        assert transforms.load_kernel() is None
        image, _ = run(made_sample(40, 50), Augmentation(crop=(24, 24)))
    finally:
        transforms.load_kernel.cache_clear()
    assert caplog.text.count("deeplabzoo[fast]") == 1
    monkeypatch.undo()
    np.testing.assert_array_equal(image, run(made_sample(40, 50), Augmentation(crop=(24, 24)))[0])


@pytest.mark.parametrize("colour", [0.0, 0.5])
def test_an_image_is_written_where_it_is_wanted(colour) -> None:
    """A batch is filled in place: no copy, and the same picture as one returned."""
    sample, augmentation = made_sample(40, 50), Augmentation(crop=(48, 40), colour=colour)
    batch = np.zeros((3, 48, 40, 3), np.uint8)
    generator = np.random.default_rng(3)
    returned, _ = augment(sample, augmentation, generator, mean_fill=FILL, ignore_index=IGNORE, out_HWC=batch[1])
    assert returned.base is batch
    np.testing.assert_array_equal(batch[1], run(sample, augmentation, 3)[0])
    assert not batch[0].any()
    assert not batch[2].any()
