"""The compiled loops: which classes are left over in a cell, how work is cut into blocks, and where machine code is kept."""

import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import TypeVar

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deeplabzoo import numba_jit
from deeplabzoo.models.interpolation import interpolation_axis
from deeplabzoo.processing import postprocessing_numba

assert numba_jit.numba_available()

Loop = TypeVar("Loop")


@settings(max_examples=200, deadline=None)
@given(classes=st.integers(1, 40), values=st.sampled_from([2, 4, 1000]), seed=st.integers(0, 999))
def test_no_class_that_could_win_is_left_out(classes: int, values: int, seed: int) -> None:
    """Every class that wins at a convex mixture of the corners is a candidate, in ascending order, however many ties."""
    rng = np.random.default_rng(seed)
    corners_4C = rng.integers(0, values, (4, classes)).astype(np.float32)
    padded = -(-classes // postprocessing_numba.LANES) * postprocessing_numba.LANES
    flat = np.full((4, padded), np.finfo(np.float32).min, np.float32)
    flat[:, :classes] = corners_4C
    found = np.empty(padded, np.int32)
    winners = [int(corner.argmax()) for corner in corners_4C]
    count = postprocessing_numba._candidates(flat.reshape(-1), padded, classes, *winners, np.empty(padded, np.float32), found)
    candidates = found[:count].tolist()
    assert candidates == sorted(set(candidates))
    along, down = rng.integers(0, 9, (2, 200)) / 8  # exact in binary, so equal mixtures are equal
    weights_N4 = np.stack([(1 - down) * (1 - along), (1 - down) * along, down * (1 - along), down * along], axis=1)
    assert set((weights_N4 @ corners_4C).argmax(axis=1).tolist()) <= set(candidates)


def test_beaten_classes_are_left_out() -> None:
    """Of 21 classes, the two that meet in a cell are left, and one that is second at every corner but never beaten by one."""
    corners_4C = np.zeros((4, 32), np.float32)
    corners_4C[:, 3], corners_4C[:, 5], corners_4C[:, 7] = (9, 1, 9, 1), (1, 9, 1, 9), (2, 2, 2, 2)
    corners_4C[:, 8] = (0.9, 8, 0.9, 8)
    found = np.empty(32, np.int32)
    count = postprocessing_numba._candidates(corners_4C.reshape(-1), 32, 21, 3, 5, 3, 5, np.empty(32, np.float32), found)
    assert found[:count].tolist() == [3, 5, 7]


@settings(max_examples=200, deadline=None)
@given(
    source=st.integers(1, 50),
    target=st.integers(1, 200),
    align_corners=st.booleans(),
    part=st.floats(0, 1),
    count=st.integers(1, 60),
)
def test_blocks_cover_every_row_once(source: int, target: int, align_corners: bool, part: float, count: int) -> None:
    """Upsampling, downsampling and cropping: ranges of cells that follow one another and hold all outputs."""
    rows = interpolation_axis(source, target, align_corners).cut(max(1, round(target * part)))
    found = postprocessing_numba._blocks(rows, count)
    assert [first for first, _ in found[1:]] == [last for _, last in found[:-1]]
    assert (found[0][0], found[-1][1]) == (0, source)
    covered = [row for first, last in found for row in range(rows.starts[first], rows.starts[last])]
    assert covered == list(range(len(rows.above)))


def test_no_folder_for_machine_code_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """A package and a home that may only be read: numba refuses to cache, and the loop is compiled in memory."""

    def njit(**options: object) -> Callable[[Loop], Loop]:
        if options.get("cache"):
            raise RuntimeError("cannot cache function: no locator available")
        return lambda loop: loop

    monkeypatch.setattr(numba_jit, "_import_numba", lambda: SimpleNamespace(njit=njit))
    assert numba_jit.cached_njit(lambda values: values.sum() + 1)(np.ones(3)) == 4


def test_a_cache_that_fills_the_disk_is_no_error() -> None:
    """Saving the machine code fails on the first call: the loop runs all the same."""

    def doubled(values: np.ndarray) -> float:
        return values.sum() * 2

    loop = numba_jit.cached_njit(doubled)

    def full(*values: object) -> float:
        raise OSError(28, "No space left on device")

    loop._run = full
    assert loop(np.ones(3)) == 6
    assert loop(np.ones(4)) == 8


def test_missing_numba_is_logged_once_and_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Labels come out all the same; whoever wants them faster learns how."""
    monkeypatch.setitem(sys.modules, "numba", None)
    numba_jit._import_numba.cache_clear()
    try:
        with caplog.at_level("INFO", logger="deeplabzoo"):
            assert not numba_jit.numba_available()
            assert not numba_jit.numba_available()
    finally:
        numba_jit._import_numba.cache_clear()
    assert len(caplog.records) == 1
    assert 'pip install "deeplabzoo[fast]"' in caplog.text


def test_a_single_image_does_not_load_numba() -> None:
    """That takes longer than the labels of an image do; a long run has the loops from then on."""
    program = (
        "import sys, torch; from deeplabzoo.processing import postprocessing\n"
        "run = lambda: postprocessing.upsample_argmax(torch.ones(1, 3, 9, 9), (513, 513), align_corners=True)\n"
        "run(); assert 'numba' not in sys.modules\n"
        "postprocessing.COMPILE_AFTER_PIXELS = 2 * 513 * 513; run(); run(); assert 'numba' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
