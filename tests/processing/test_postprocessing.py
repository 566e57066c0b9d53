"""Labels without full-size logits equal the arg-max of torch's own interpolation: compiled cells, and torch alone."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deeplabzoo import numba_jit
from deeplabzoo.errors import UsageError
from deeplabzoo.processing import postprocessing, postprocessing_numba
from deeplabzoo.processing import postprocessing as labels_module
from deeplabzoo.processing.postprocessing import (
    ClassArea,
    OutputGeometry,
    argmax_labels,
    argmax_labels_with_confidence,
    class_areas,
    class_logits,
    upsample_argmax,
    upsampled_logits,
)

ULPS = 8
"""Two classes this many units in the last place of the largest logit apart, or nearer, may change places."""


@pytest.fixture(params=["compiled", "torch"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to labels, cut into many blocks and bands; the torch one also where it would not pay."""
    monkeypatch.setattr(postprocessing_numba, "BLOCK_PIXELS", 50)
    monkeypatch.setattr(labels_module, "BAND_VALUES", 5000)
    if request.param == "torch":
        monkeypatch.setattr(numba_jit, "numba_available", lambda: False)
        monkeypatch.setattr(postprocessing, "MAX_BOUNDARY_FRACTION", 1.0)
    else:
        assert labels_module.compile_postprocessing(), "the test extra contains numba"
    return request.param


@pytest.fixture
def no_bands(monkeypatch: pytest.MonkeyPatch) -> None:
    """The plain way is not an answer here."""

    def refused(*arguments: object) -> torch.Tensor:
        raise AssertionError("labels were made in bands")

    monkeypatch.setattr(labels_module, "_argmax_in_bands", refused)


def interpolated(low_BCHW: torch.Tensor, size_hw: tuple[int, int], align_corners: bool) -> torch.Tensor:
    return F.interpolate(low_BCHW, size=size_hw, mode="bilinear", align_corners=align_corners)


def assert_argmax(labels_BHW: torch.Tensor, logits_BCHW: torch.Tensor) -> None:
    """Every label is torch's own arg-max, or its logit is within rounding of the largest and stands before or after it."""
    expected_BHW = logits_BCHW.argmax(dim=1)
    different = labels_BHW.long() != expected_BHW
    if not different.any():
        return
    at_label = logits_BCHW.gather(1, labels_BHW.long()[:, None])[:, 0]
    gap = (logits_BCHW.amax(dim=1) - at_label)[different]
    assert gap.max() <= ULPS * torch.finfo(torch.float32).eps * logits_BCHW.abs().max()


def logits(shape: tuple[int, ...], kind: str, seed: int) -> torch.Tensor:
    """Noise (every cell a boundary), a few values (ties everywhere), or blobs as a model's (few boundaries)."""
    generator = torch.Generator().manual_seed(seed)
    if kind == "ties":
        return torch.randint(-1, 2, shape, generator=generator).float()
    if kind == "blobs":
        batch, classes, h, w = shape
        coarse = torch.randn(batch, classes, -(-h // 4), -(-w // 4), generator=generator) * 5
        return F.interpolate(coarse, size=(h, w), mode="bilinear") + 0.01 * torch.randn(shape, generator=generator)
    return torch.randn(shape, generator=generator)


SETTINGS = settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@SETTINGS
@given(
    low_hw=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    size_hw=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    batch=st.integers(1, 3),
    classes=st.sampled_from([1, 2, 3, 15, 16, 17, 21, 33]),
    align_corners=st.booleans(),
    channels_last=st.booleans(),
    kind=st.sampled_from(["noise", "ties", "blobs"]),
    seed=st.integers(0, 999),
)
@pytest.mark.usefixtures("no_bands")
def test_labels_are_the_argmax_of_torchs_interpolation(
    way, low_hw, size_hw, batch, classes, align_corners, channels_last, kind, seed
) -> None:
    """Larger, smaller, equal and odd ratios; both conventions, both layouts; rounding alone may decide otherwise."""
    low = logits((batch, classes, *low_hw), kind, seed)
    expected = interpolated(class_logits(low), size_hw, align_corners)  # one channel is binary
    layout = torch.channels_last if channels_last else torch.contiguous_format
    labels = upsample_argmax(low.contiguous(memory_format=layout), size_hw, align_corners=align_corners)
    assert labels.shape == (batch, *size_hw)
    assert labels.dtype == torch.uint8
    assert_argmax(labels, expected)


@pytest.mark.usefixtures("no_bands")
def test_the_first_of_equal_classes_wins(way: str) -> None:
    """Weights of one half and small whole numbers are exact in float32, so ties are ties and not nearly so."""
    low = torch.randint(0, 3, (2, 5, 9, 9), generator=torch.Generator().manual_seed(3)).float()
    low[:, 4] = low[:, 1]
    labels = upsample_argmax(low, (17, 17), align_corners=True)
    expected = interpolated(low.double(), (17, 17), True)
    ties = (expected == expected.amax(dim=1, keepdim=True)).sum(dim=1) > 1
    assert ties.float().mean() > 0.2
    assert torch.equal(labels.long(), expected.argmax(dim=1))
    assert not (labels == 4).any()


@pytest.mark.usefixtures("no_bands")
@pytest.mark.parametrize(("classes", "dtype"), [(255, torch.uint8), (256, torch.uint8), (257, torch.int32)])
def test_a_byte_holds_256_classes(way: str, classes: int, dtype: torch.dtype) -> None:
    low = torch.zeros(1, classes, 3, 3)
    low[:, -1, 1:] = 1
    labels = upsample_argmax(low, (9, 9), align_corners=False)
    assert labels.dtype == dtype
    assert (int(labels[0, -1, 0]), int(labels[0, 0, 0])) == (classes - 1, 0)


@pytest.mark.usefixtures("no_bands")
def test_many_classes_need_wider_labels(way: str) -> None:
    """Class 299 does not fit into a byte: int32 as a tensor, uint16 on an image."""
    low = torch.zeros(1, 300, 3, 3)
    low[:, 299, 1:] = 1
    labels = upsample_argmax(low, (20, 20), align_corners=False)
    assert labels.dtype == torch.int32
    assert_argmax(labels, interpolated(low, (20, 20), False))
    on_photo = argmax_labels(low, OutputGeometry((20, 20), (20, 20), (20, 20), align_corners=False))
    assert on_photo.dtype == np.uint16
    np.testing.assert_array_equal(on_photo, labels[0].numpy())


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_logits_that_are_not_finite_are_treated_as_torch_does(way: str, value: float, layout: torch.memory_format) -> None:
    """0 x inf is NaN and NaN is largest; no cell may be filled past one, wherever it stands."""
    for place in [(0, 0, 0, 0), (0, 2, 3, 4), (1, 6, 8, 8)]:
        low = logits((2, 7, 9, 9), "blobs", 5)
        low[place] = value
        labels = upsample_argmax(low.contiguous(memory_format=layout), (40, 50), align_corners=False)
        grid = OutputGeometry((40, 50), (40, 50), (40, 50), align_corners=False)
        expected = torch.cat([upsampled_logits(one[None], grid) for one in low]).max(dim=1).indices
        assert torch.equal(labels.long(), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_float_type_is_taken(way: str, dtype: torch.dtype) -> None:
    """Interpolated as float32, also with a gradient attached."""
    low = logits((1, 5, 9, 9), "blobs", 2).to(dtype).requires_grad_()
    labels = upsample_argmax(low, (33, 33), align_corners=True)
    assert_argmax(labels, interpolated(low.detach().float(), (33, 33), True))


@pytest.mark.usefixtures("no_bands")
def test_slices_and_views_are_taken_as_they_are(way: str) -> None:
    """Memory that is neither layout: a crop, a mirrored and a transposed map."""
    base = logits((2, 6, 12, 14), "noise", 4)
    for low in (base[:, 1:, 2:-1, 3:], base.transpose(2, 3), base.expand(2, 6, 12, 14)[:1], base.permute(0, 1, 3, 2)[..., ::2]):
        assert_argmax(upsample_argmax(low, (31, 45), align_corners=False), interpolated(low, (31, 45), False))


@SETTINGS
@given(
    low_hw=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    padded_hw=st.tuples(st.integers(33, 90), st.integers(33, 90)),
    part=st.tuples(st.floats(0.02, 1), st.floats(0.02, 1)),
    align_corners=st.booleans(),
    flipped=st.booleans(),
    seed=st.integers(0, 99),
)
@pytest.mark.usefixtures("no_bands")
def test_crop_and_mirror_need_no_bands(way, low_hw, padded_hw, part, align_corners, flipped, seed) -> None:
    """An image that was only padded and mirrored, never resized, is one upsampling."""
    valid_hw = (max(1, round(padded_hw[0] * part[0])), max(1, round(padded_hw[1] * part[1])))
    grid = OutputGeometry(padded_hw, valid_hw, valid_hw, align_corners, flipped)
    low = logits((1, 7, *low_hw), "blobs", seed)
    labels = argmax_labels(low, grid)
    assert labels.flags.c_contiguous
    assert_argmax(torch.from_numpy(labels)[None], upsampled_logits(low, grid))


def test_two_resizes_are_exact() -> None:
    """An image that was shrunk before is the arg-max of the logits resized twice."""
    grid = OutputGeometry((65, 97), (40, 60), (83, 121), align_corners=True, flipped=True)
    low = logits((1, 5, 5, 7), "noise", 1)
    np.testing.assert_array_equal(argmax_labels(low, grid), upsampled_logits(low, grid).argmax(1)[0].numpy())


def test_eight_threads_get_what_one_gets(monkeypatch: pytest.MonkeyPatch) -> None:
    """One model serves many requests: callers share threads, never labels."""
    assert labels_module.compile_postprocessing()
    monkeypatch.setattr(postprocessing_numba, "BLOCK_PIXELS", 2000)
    maps = [logits((1, 21, 33, 33), "blobs", seed) for seed in range(8)]
    alone = [upsample_argmax(low, (300, 400), align_corners=True) for low in maps]
    start = threading.Barrier(8)

    def many(number: int) -> bool:
        start.wait()
        return all(torch.equal(upsample_argmax(maps[number], (300, 400), align_corners=True), alone[number]) for _ in range(20))

    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        with ThreadPoolExecutor(8) as pool:
            assert all(pool.map(many, range(8)))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("classes", [1, 2, 300])
def test_confidence_is_the_probability_of_the_label(classes: int) -> None:
    """The largest softmax of the upsampled logits, and the same labels."""
    low = logits((1, classes, 6, 7), "noise", 8)
    labels, confidence = argmax_labels_with_confidence(low, OutputGeometry((50, 41), (50, 41), (50, 41), align_corners=False))
    expected = interpolated(low, (50, 41), False)
    assert_argmax(torch.from_numpy(labels.astype(np.int32))[None], expected)
    assert confidence.dtype == np.float32
    np.testing.assert_allclose(confidence, expected[0].softmax(dim=0).amax(dim=0).numpy(), atol=1e-5, rtol=1e-5)


@contextmanager
def only_in_bands(band_values: int) -> Iterator[list[int]]:
    """Let labels be made in bands alone, each of so many logits; gives how many there were in each."""
    seen: list[int] = []
    plain = labels_module._upsample_columns

    def watched(rows_1CHW: torch.Tensor, grid: OutputGeometry) -> torch.Tensor:
        widest = max(grid.padded_hw[1], grid.original_hw[1])
        seen.append(rows_1CHW.shape[1] * rows_1CHW.shape[2] * widest)
        return plain(rows_1CHW, grid)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(labels_module, "_fused_argmax", lambda *_: False)
        patch.setattr(labels_module, "_upsample_columns", watched)
        patch.setattr(labels_module, "BAND_VALUES", band_values)
        yield seen


@settings(max_examples=60, deadline=None)
@given(
    low_hw=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    padded_hw=st.tuples(st.integers(33, 90), st.integers(33, 90)),
    part=st.tuples(st.floats(0.02, 1), st.floats(0.02, 1)),
    original_hw=st.tuples(st.integers(1, 150), st.integers(1, 150)),
    align_corners=st.booleans(),
    flipped=st.booleans(),
    band_values=st.integers(1, 30_000),
    seed=st.integers(0, 99),
)
def test_labels_in_bands_equal_the_plain_argmax(
    low_hw, padded_hw, part, original_hw, align_corners, flipped, band_values, seed
) -> None:
    """A large image gives the same labels as a small memory footprint does: not nearly, exactly (theme K)."""
    valid_hw = (max(1, round(padded_hw[0] * part[0])), max(1, round(padded_hw[1] * part[1])))
    grid = OutputGeometry(padded_hw, valid_hw, original_hw, align_corners, flipped)
    low = torch.randn(1, 7, *low_hw, generator=torch.Generator().manual_seed(seed))
    low[:, 3] = low[:, 5]  # equal logits: the first class wins
    expected = upsampled_logits(low, grid).argmax(1)[0].numpy()
    with only_in_bands(band_values):
        labels = argmax_labels(low, grid)
    assert labels.dtype == np.uint8
    np.testing.assert_array_equal(labels, expected)


@pytest.mark.parametrize("make", [argmax_labels, argmax_labels_with_confidence])
@pytest.mark.parametrize(("size_hw", "most"), [((1500, 2000), 21 * 2000 * 24), ((65, 20), 21 * 97 * 7), ((20, 97), 10)])
def test_memory_for_labels_does_not_grow_with_the_image(make, size_hw: tuple[int, int], most: int) -> None:
    """A 24-megapixel image at 21 classes would be 2 GB of logits; a band is as large as it may be, and no larger (theme K)."""
    grid = OutputGeometry((65, 97), (65, 97), size_hw, align_corners=True)
    with only_in_bands(most) as seen:
        made = make(torch.randn(1, 21, 5, 7), grid)
    assert (made if make is argmax_labels else made[0]).shape == size_hw
    one_row = 21 * max(97, size_hw[1])
    assert max(seen) <= max(most, one_row)
    assert sum(seen) == one_row * size_hw[0]
    assert len(seen) == -(-size_hw[0] // max(1, most // one_row))
    assert 4 * labels_module.BAND_VALUES <= 16 * 2**20, "bytes of float32 where nobody says otherwise"


def test_many_classes_need_wider_labels_after_two_resizes() -> None:
    """Class 299 does not fit into a byte and must not come out as class 43."""
    low = torch.zeros(1, 300, 3, 3)
    low[:, 299] = 1
    labels = argmax_labels(low, OutputGeometry((33, 33), (33, 33), (10, 10), align_corners=False))
    assert labels.dtype == np.uint16
    assert (labels == 299).all()


def test_areas_count_every_pixel_once() -> None:
    """Largest first, only what occurs, and the shares add up to the whole image."""
    labels = np.array([[2, 2, 2], [0, 1, 1]], np.uint8)
    areas = class_areas(labels, ("background", "red", "green", "blue"))
    assert [(area.name, area.pixels) for area in areas] == [("green", 3), ("red", 2), ("background", 1)]
    assert sum(area.share for area in areas) == pytest.approx(1)


def test_impossible_shapes_are_sentences() -> None:
    """Not an index error three calls further down."""
    fine = torch.zeros(1, 2, 3, 3)
    wrong = [(torch.zeros(3, 4, 5), (9, 9)), (torch.zeros(1, 2, 3, 4, 5), (9, 9)), (torch.zeros(1, 0, 3, 3), (9, 9))]
    for low, size in [*wrong, (fine, (0, 9)), (fine, (9, 0))]:
        with pytest.raises(UsageError, match="logits of shape B x classes x h x w"):
            upsample_argmax(low, size, align_corners=False)


def test_plain_data_cannot_be_changed() -> None:
    """A grid is a key, and areas are shared with whoever asked."""
    for kind in (OutputGeometry, ClassArea):
        assert kind.__dataclass_params__.frozen, kind


def test_compiling_ahead_runs_the_loops_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where numba is there; where it is not, nothing is made and that is the answer."""
    made: list[torch.Size] = []
    plain = postprocessing_numba.upsample_argmax_by_block

    def watched(low_BCHW: torch.Tensor, *rest: object) -> bool:
        made.append(low_BCHW.shape)
        return plain(low_BCHW, *rest)

    monkeypatch.setattr(postprocessing_numba, "upsample_argmax_by_block", watched)
    monkeypatch.setattr(labels_module, "_pixels_without_numba", 0)
    assert labels_module.compile_postprocessing()
    assert [min(shape) > 0 for shape in made] == [True]
    monkeypatch.setattr(numba_jit, "numba_available", lambda: False)
    assert not labels_module.compile_postprocessing()
    assert len(made) == 1


def test_the_compiled_loops_wait_for_a_long_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few images are sooner labelled by torch than numba is loaded: 16 million pixels, counted over calls."""
    made: list[str] = []
    monkeypatch.setattr(postprocessing_numba, "upsample_argmax_by_block", lambda *_: made.append("compiled") or False)
    monkeypatch.setattr(labels_module, "upsample_argmax_by_boundary", lambda *_: made.append("torch") or False)
    monkeypatch.setattr(labels_module, "_argmax_in_bands", lambda *_: torch.zeros(4096, 4096))
    monkeypatch.setattr(labels_module, "_pixels_without_numba", -1)
    for _ in range(3):
        upsample_argmax(torch.zeros(1, 2, 2, 2), (4096, 4096), align_corners=False)
    assert made == ["torch", "torch", "compiled"]


def test_an_empty_batch_has_empty_labels(way: str) -> None:
    """Nothing in, nothing out."""
    assert upsample_argmax(torch.zeros(0, 3, 4, 4), (9, 9), align_corners=False).shape == (0, 9, 9)


def test_noise_is_not_gathered_pixel_by_pixel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without numba, a map that is all boundary goes the plain way, which is faster there, and says the same."""
    monkeypatch.setattr(numba_jit, "numba_available", lambda: False)
    low = logits((1, 9, 20, 20), "noise", 6)
    assert not postprocessing.upsample_argmax_by_boundary(
        low, *[labels_module.interpolation_axis(20, 50, False)] * 2, torch.empty(1, 50, 50, dtype=torch.uint8), 1000
    )
    assert_argmax(upsample_argmax(low, (50, 50), align_corners=False), interpolated(low, (50, 50), False))
