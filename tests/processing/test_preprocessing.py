"""The way into the model and back: what the tensor holds, and that every pixel comes home."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.color_net import ColorNet

from deeplabzoo.device import choose_device, eval_mode
from deeplabzoo.errors import UsageError
from deeplabzoo.models.config import Preprocessing
from deeplabzoo.processing.postprocessing import OutputGeometry, upsampled_logits
from deeplabzoo.processing.preprocessing import image_labels, image_logits, image_probabilities, prepare


def photo(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def quadrants(height: int, width: int) -> np.ndarray:
    """Black, red / green, blue."""
    image = np.zeros((height, width, 3), np.uint8)
    image[: height // 2, width // 2 :, 0] = 255
    image[height // 2 :, : width // 2, 1] = 255
    image[height // 2 :, width // 2 :, 2] = 255
    return image


def test_tensor_holds_the_documented_value() -> None:
    """(pixel / 255 - mean) / std, per channel in the weights' order; preprocessing differs by checkpoint (bonlime#3)."""
    image = photo(40, 50)
    rgb = Preprocessing(size=(64, 64), mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
    expected = (image / 255 - np.array(rgb.mean)) / np.array(rgb.std)
    np.testing.assert_allclose(prepare(image, rgb).tensor_1CHW[0].permute(1, 2, 0).numpy(), expected, atol=1e-6)
    bgr = Preprocessing(size=(64, 64), mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7), channel_order="BGR")
    expected = (image[..., ::-1] / 255 - np.array(bgr.mean)) / np.array(bgr.std)
    np.testing.assert_allclose(prepare(image, bgr).tensor_1CHW[0].permute(1, 2, 0).numpy(), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("resize", "only_shrink", "size", "given_hw", "expected_hw"),
    [
        ("none", True, (513, 513), (600, 900), (600, 900)),
        ("longest", True, (200, 200), (100, 400), (50, 200)),
        ("longest", True, (200, 200), (40, 80), (40, 80)),
        ("longest", False, (200, 200), (40, 80), (100, 200)),
        ("shortest", True, (200, 200), (400, 800), (200, 400)),
        ("shortest", False, (200, 200), (40, 80), (200, 400)),
        ("longest", True, (100, 200), (400, 400), (100, 100)),
        ("shortest", True, (100, 200), (400, 400), (200, 200)),
        ("longest", True, (200, 200), (2, 4000), (1, 200)),
    ],
)
def test_image_is_brought_to_the_weights_size(resize, only_shrink, size, given_hw, expected_hw) -> None:
    """`longest` fits into the size, `shortest` covers it, and a small photo is enlarged only where the weights ask for it."""
    preprocessing = Preprocessing(size=size, resize=resize, only_shrink=only_shrink)
    assert prepare(photo(*given_hw), preprocessing).valid_hw == expected_hw


def test_padding_stands_at_the_bottom_and_right_and_is_the_mean_colour() -> None:
    """TensorFlow's models were trained on images padded so; zeros after normalisation are the mean colour."""
    prepared = prepare(photo(40, 60), Preprocessing(size=(65, 97), pad=True, resize="none"))
    assert prepared.tensor_1CHW.shape == (1, 3, 65, 97)
    assert prepared.valid_hw == (40, 60)
    assert not prepared.tensor_1CHW[:, :, 40:].any()
    assert not prepared.tensor_1CHW[..., 60:].any()
    assert prepared.tensor_1CHW[:, :, :40, :60].any()
    larger = prepare(photo(70, 98), Preprocessing(size=(65, 97), pad=True, resize="none"))
    assert larger.tensor_1CHW.shape == (1, 3, 70, 98)


@pytest.mark.parametrize(("scale", "side"), [(0.5, 257), (0.75, 385), (1.0, 513), (1.25, 641), (1.5, 769), (1.75, 897)])
def test_scales_keep_the_form_of_the_padded_size(scale: float, side: int) -> None:
    """At 513 x scale the grid of a stride-16 model still meets both borders (DeepLab's own evaluation sizes)."""
    prepared = prepare(photo(100, 200), Preprocessing(pad=True, resize="none"), scale=scale)
    assert prepared.tensor_1CHW.shape[2:] == (side, side)
    assert prepared.valid_hw == (round(100 * scale), round(200 * scale))
    with pytest.raises(UsageError, match="scale must be above 0"):
        prepare(photo(4, 4), Preprocessing(), scale=0)


def test_small_images_reach_the_smallest_input() -> None:
    """A thumbnail is a photo, too: it is padded to 33 pixels, not refused (SMP#421: "divisible by 32")."""
    prepared = prepare(photo(2, 50), Preprocessing(resize="none"))
    assert prepared.tensor_1CHW.shape == (1, 3, 33, 50)
    assert image_labels(ColorNet(), prepared).shape == (2, 50)


def test_shrinking_averages_instead_of_picking() -> None:
    """A fine chequerboard seen from afar is grey; without antialiasing it would be black, white or noise."""
    board = np.indices((512, 512)).sum(0) % 2 * 255
    image = np.repeat(board[..., None], 3, 2).astype(np.uint8)
    plain = Preprocessing(size=(64, 64), mean=(0, 0, 0), std=(1, 1, 1))
    tensor = prepare(image, plain).tensor_1CHW
    assert tensor.shape == (1, 3, 64, 64)
    assert (tensor - 0.5).abs().max() < 0.02


def test_the_image_itself_is_left_alone() -> None:
    """Neither a read-only array nor the caller's own is touched or warned about."""
    image = photo(40, 40)
    image.setflags(write=False)
    before = image.copy()
    prepare(image, Preprocessing(), flip=True)
    np.testing.assert_array_equal(image, before)


def reference(low: torch.Tensor, grid: OutputGeometry) -> torch.Tensor:
    """The way back in four plain calls, on whole maps."""
    x = F.interpolate(low, size=grid.padded_hw, mode="bilinear", align_corners=grid.align_corners)
    x = x[:, :, : grid.valid_hw[0], : grid.valid_hw[1]]
    x = x.flip(3) if grid.flipped else x
    return (
        F.interpolate(x, size=grid.original_hw, mode="bilinear", align_corners=False) if x.shape[2:] != grid.original_hw else x
    )


GRIDS = [
    OutputGeometry((65, 97), (65, 97), (65, 97), align_corners=True),
    OutputGeometry((65, 97), (40, 97), (40, 97), align_corners=True),
    OutputGeometry((65, 97), (40, 60), (83, 121), align_corners=True, flipped=True),
    OutputGeometry((65, 97), (40, 60), (21, 33), align_corners=False),
    OutputGeometry((65, 97), (40, 60), (60, 83), align_corners=False),
    OutputGeometry((97, 65), (60, 40), (83, 60), align_corners=False),
    OutputGeometry((33, 33), (1, 33), (2, 700), align_corners=False, flipped=True),
    OutputGeometry((33, 33), (2, 2), (2, 2), align_corners=True),
]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_way_back_equals_plain_interpolation(grid: OutputGeometry) -> None:
    """Rows first and columns last is the same bilinear map as torch's; logits come back at H x W (transformers#20255)."""
    low = torch.randn(
        1, 5, -(-grid.padded_hw[0] // 16), -(-grid.padded_hw[1] // 16), generator=torch.Generator().manual_seed(1)
    )
    torch.testing.assert_close(upsampled_logits(low, grid), reference(low, grid), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("align_corners", "flip", "pad", "resize"),
    list(itertools.product((False, True), (False, True), (False, True), ("none", "longest"))),
)
def test_every_pixel_comes_home(align_corners: bool, flip: bool, pad: bool, resize: str) -> None:
    """Whatever was padded, mirrored or resized on the way in, each quadrant's label lies on its quadrant."""
    preprocessing = Preprocessing(size=(129, 129), pad=pad, resize=resize)
    net = ColorNet(preprocessing=preprocessing, align_corners=align_corners).eval()
    labels = image_labels(net, prepare(quadrants(150, 222), preprocessing, flip=flip))
    assert labels.shape == (150, 222)
    for label, rows, columns in [(0, (0, 65), (0, 101)), (1, (0, 65), (121, 222)), (2, (85, 150), (0, 101))]:
        assert (labels[slice(*rows), slice(*columns)] == label).all()
    assert (labels[85:, 121:] == 3).all()


def test_labels_are_the_argmax_of_the_logits() -> None:
    """Two ways to ask, one answer."""
    net = ColorNet(align_corners=True).eval()
    prepared = prepare(photo(200, 301), net.preprocessing)
    logits = image_logits(net, prepared)
    assert logits.shape == (1, 4, 200, 301)
    assert logits.dtype == torch.float32
    np.testing.assert_array_equal(image_labels(net, prepared), logits.argmax(1)[0].numpy())


def test_probabilities_are_averaged_over_scales_and_mirror() -> None:
    """Each view counts once, as probabilities and not as logits (DeepLabV3, section 4.1)."""
    net = ColorNet().eval()
    image = photo(100, 140)
    views = [prepare(image, net.preprocessing, scale=scale, flip=flip) for scale in (0.5, 1.0, 1.25) for flip in (False, True)]
    expected = torch.stack([image_logits(net, view).softmax(1) for view in views]).mean(0)
    probabilities = image_probabilities(net, image, (0.5, 1.0, 1.25), flip=True)
    torch.testing.assert_close(probabilities, expected)
    torch.testing.assert_close(probabilities.sum(1), torch.ones(1, 100, 140))
    torch.testing.assert_close(image_probabilities(net, image), image_logits(net, prepare(image, net.preprocessing)).softmax(1))
    with pytest.raises(UsageError, match="at least one scale"):
        image_probabilities(net, image, ())


def test_training_flags_come_back_even_after_an_error() -> None:
    """Looking at one image between two epochs must not switch batch norm off for the second."""
    net = torch.nn.Sequential(torch.nn.BatchNorm2d(3), torch.nn.Dropout(0.5))
    net.train()
    net[0].eval()  # frozen on purpose

    def interrupted() -> None:
        with eval_mode(net):
            assert not any(module.training for module in net.modules())
            assert torch.is_inference_mode_enabled()
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        interrupted()
    assert (net.training, net[0].training, net[1].training) == (True, False, True)


def test_automatic_device_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    """Nobody should wait minutes beside an idle GPU without a word (villa#1764)."""
    with caplog.at_level("INFO", logger="deeplabzoo"):
        device = choose_device("auto")
    assert f"device: {device.type}" in caplog.text


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "meta", ""])
def test_unusable_device_is_a_sentence(device: str) -> None:
    """It names the devices that are here instead."""
    with pytest.raises(UsageError, match="auto"):
        choose_device(device)
