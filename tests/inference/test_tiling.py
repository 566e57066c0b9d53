"""A large image in tiles: the labels that the whole would have, no seam, and nothing changed for an ordinary image."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.color_net import ColorNet
from hypothesis import given, settings
from hypothesis import strategies as st

from deeplabzoo.errors import ImageError, UsageError
from deeplabzoo.inference.large_image import ArrayRowReader, ResizedRowReader
from deeplabzoo.inference.predictor import Predictor
from deeplabzoo.inference.tiling import AUTO_PIXELS, UNIT, TileAxis, Tiling, predict_bands, tiling_for
from deeplabzoo.models.config import DeepLabConfig, Preprocessing
from deeplabzoo.models.deeplab import DeepLab
from deeplabzoo.processing.preprocessing import image_labels, prepare

AS_IT_IS = Preprocessing(size=(129, 129), resize="none")


def clouds(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Soft blobs of all colours, so that classes meet everywhere."""
    noise = torch.from_numpy(np.random.default_rng(seed).random((1, 3, height // 16 + 2, width // 16 + 2), dtype=np.float32))
    soft = F.interpolate(noise, size=(height, width), mode="bicubic", align_corners=False).clamp(0, 1)
    return (soft * 255).byte()[0].permute(1, 2, 0).numpy()


def in_tiles(net: torch.nn.Module, image: np.ndarray, tiling: Tiling, first_row: int = 0) -> np.ndarray:
    forward, align = net.forward_low_resolution, net.config.align_corners
    bands = predict_bands(forward, ArrayRowReader(image), net.preprocessing, tiling, align_corners=align, first_row=first_row)
    with torch.inference_mode():
        return np.concatenate([labels for _, labels in bands])


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 900), st.integers(64, 400), st.integers(0, 300), st.booleans(), st.sampled_from([4, 8, 16, 32]))
def test_weights_of_overlapping_tiles_sum_to_one_everywhere(
    size: int, tile: int, overlap: int, aligned: bool, cell: int
) -> None:
    """Less would fade a class, more would favour it: a seam; and every pixel of the image is in some tile."""
    axis = TileAxis.of(size, tile, min(overlap, tile - UNIT), aligned=aligned)
    total = np.zeros(axis.total_cells(cell))
    for start, weights in zip(axis.starts, axis.weights(cell), strict=True):
        total[start // cell : start // cell + len(weights)] += weights
    np.testing.assert_allclose(total, 1, atol=1e-5)
    assert axis.starts[-1] + axis.tile >= size
    assert all(start % UNIT == 0 for start in axis.starts)
    shared = [before + axis.tile - after for before, after in zip(axis.starts, axis.starts[1:], strict=False)]
    assert all(pixels >= min(overlap, axis.tile - UNIT - aligned) for pixels in shared)


@pytest.mark.parametrize(("align_corners", "height", "width"), [(False, 320, 512), (True, 353, 513)])
@pytest.mark.parametrize("tiling", [Tiling((128, 160), 64), Tiling((96, 96), 32), Tiling((64, 352), 32)])
def test_tiles_give_the_labels_of_the_whole_where_context_does_not_count(
    align_corners: bool, height: int, width: int, tiling: Tiling
) -> None:
    """A model without context shows the tiling alone: blending and upsampling may not move or blur anything."""
    net = ColorNet(align_corners=align_corners, preprocessing=AS_IT_IS).eval()
    image = clouds(height, width)
    whole = image_labels(net, prepare(image, net.preprocessing))
    assert len(np.unique(whole)) == 4
    assert (in_tiles(net, image, tiling) == whole).mean() > 0.9999  # equal but where two classes are equal to rounding


def test_tiles_have_the_parity_that_the_weights_were_trained_at() -> None:
    """A model that aligns corners is stretched at even sides; weights of even size expect that (CamVid: five points)."""
    photo = clouds(300, 500)
    for size, expected in (((129, 129), 129), ((128, 160), 128)):
        net = ColorNet(align_corners=True, preprocessing=Preprocessing(size=size, resize="none"))
        labels = Predictor(net, "cpu", tile=128, overlap=32)(photo).labels
        assert {shape[2:] for shape in net.seen_shapes} == {(expected, expected)}
        whole = Predictor(ColorNet(preprocessing=AS_IT_IS), "cpu")(photo).labels
        assert (labels == whole).mean() > 0.85  # coarse cells: what is asked here is that nothing is shifted by one


@pytest.mark.parametrize("scale", [0.5, 1.7])
def test_a_scaled_image_in_tiles_equals_the_scaled_whole(scale: float) -> None:
    """`scale` means what it means in `prepare`, at the original's size again in the end."""
    net = ColorNet(preprocessing=AS_IT_IS).eval()
    image = clouds(round(320 / scale), round(512 / scale))
    whole = image_labels(net, prepare(image, net.preprocessing, scale=scale))
    tiled = in_tiles(net, image, Tiling((128, 160), 64, scale))
    assert tiled.shape == image.shape[:2]
    assert (tiled == whole).mean() > 0.99  # Pillow's resize against torch's: within one grey level


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("scale", [1.0, 0.6])
def test_beginning_at_any_row_gives_the_same_labels(align_corners: bool, scale: float) -> None:
    """What a resumed run relies on."""
    net = ColorNet(align_corners=align_corners, preprocessing=AS_IT_IS).eval()
    image, tiling = clouds(433, 301), Tiling((128, 128), 32, scale)
    whole = in_tiles(net, image, tiling)
    for row in (1, 37, 96, 200, 431, 432):
        np.testing.assert_array_equal(in_tiles(net, image, tiling, row), whole[row:])


@pytest.mark.parametrize("architecture", ["deeplabv3", "deeplabv3plus"])
def test_inside_the_overlap_no_seam_stands_out(architecture: str) -> None:
    """Logits of neighbours fade into each other: across the seam, labels change no more often than elsewhere."""
    torch.manual_seed(0)
    net = DeepLab(DeepLabConfig(architecture=architecture, encoder="resnet18", num_classes=4), preprocessing=AS_IT_IS).eval()
    image = clouds(256, 640, seed=3)
    tiling = Tiling((256, 256), 128)
    axis = TileAxis.of(640, 256, 128, aligned=False)
    labels = in_tiles(net, image, tiling)
    changes = (labels[:, 1:] != labels[:, :-1]).mean(axis=0)
    seams = [(before + axis.tile + after) // 2 for before, after in zip(axis.starts, axis.starts[1:], strict=False)]
    assert len(seams) >= 2
    beside = max(changes[seam - 3 : seam + 3].max() for seam in seams)
    assert beside <= max(0.1, 2 * np.quantile(changes, 0.99))


def test_an_ordinary_image_is_never_cut_by_itself() -> None:
    """Weights that resize images get them whole, whatever their size; weights that take any size get tiles above a limit."""
    shrinking, any_size = Preprocessing(size=(513, 513), resize="longest"), AS_IT_IS
    assert tiling_for((20000, 20000), shrinking) is None
    assert tiling_for((2048, 2048), any_size) is None
    tiling = tiling_for((2049, 2048), any_size)
    assert tiling is not None
    assert tiling.scale is None
    assert tiling.model_hw((2049, 2048), any_size) == (2049, 2048)
    assert tiling_for((2048, AUTO_PIXELS // 2048), any_size) is None
    photo = clouds(300, 420)
    net = ColorNet(preprocessing=shrinking)
    np.testing.assert_array_equal(
        Predictor(net, "cpu")(photo).labels,
        Predictor(net, "cpu", tile=None)(photo).labels,
    )


def test_the_predictor_cuts_where_it_is_asked_to_and_keeps_the_images_resolution() -> None:
    """`tile=128`: no tile is larger, and small things are seen that a photo shrunk to 129 pixels has lost."""
    net = ColorNet(preprocessing=Preprocessing(size=(129, 129), resize="longest"))
    photo = np.zeros((600, 900, 3), np.uint8)
    photo[300:306, 500:506, 0] = 255
    result = Predictor(net, "cpu", tile=128, overlap=32)(photo)
    assert {shape[2:] for shape in net.seen_shapes} == {(128, 128)}
    assert result.labels.shape == (600, 900)
    assert result.labels[302:304, 502:504].all()
    assert not Predictor(net, "cpu")(photo).labels.any()


def test_automatic_tiling_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    """Nothing silent: one line names the tiles and how to turn them off."""
    predictor = Predictor(ColorNet(preprocessing=AS_IT_IS), "cpu")
    predictor(np.zeros((1100, 4000, 3), np.uint8))
    assert "4000 x 1100 pixels are cut into tiles of 768 x 768" in caplog.text


@pytest.mark.parametrize(
    ("settings_", "words"),
    [
        ({"tile": 10}, "at least 64 pixels"),
        ({"tile": 256, "overlap": 250}, "overlap must be"),
        ({"tile": 256, "scale": 0}, "scale must be"),
        ({"overlap": 64}, "belong to tiles"),
        ({"max_pixels": 0}, "max_pixels"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings_: dict[str, object], words: str) -> None:
    """In one sentence, before anything is computed."""
    with pytest.raises(UsageError, match=words):
        Predictor(ColorNet(), "cpu", **settings_)


def test_more_pixels_than_allowed_are_refused(tmp_path) -> None:
    """`max_pixels` of the predictor is what guards the memory."""
    from PIL import Image

    Image.new("RGB", (100, 100)).save(tmp_path / "a.png")
    with pytest.raises(ImageError, match="more than the limit of 5000"):
        Predictor(ColorNet(), "cpu", max_pixels=5000)(tmp_path / "a.png")


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 300), st.integers(2, 90), st.floats(0.1, 3), st.integers(1, 70))
def test_rows_of_a_resized_image_do_not_depend_on_how_it_is_cut(height: int, width: int, scale: float, step: int) -> None:
    """Read in bands, with what overlaps read again, the resized image is the one that is resized in one step."""
    from PIL import Image

    image = np.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    hw = (max(1, round(height * scale)), max(1, round(width * scale)))
    whole = np.asarray(Image.fromarray(image).resize((hw[1], hw[0]), Image.Resampling.BILINEAR))
    rows = ResizedRowReader(ArrayRowReader(image), hw)
    for top in range(0, hw[0], step):
        bottom = min(hw[0], top + 2 * step)
        difference = np.abs(rows.rows(top, bottom).astype(int) - whole[top:bottom])
        assert difference.max() <= 1
