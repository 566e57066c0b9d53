"""docs/compatibility.md: every cell is tried here, and the page is what the tool writes."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import deeplabzoo
from deeplabzoo.data.dataset import Sample
from deeplabzoo.errors import DeepLabZooError
from deeplabzoo.export.exporter import export
from deeplabzoo.export.formats import ExportConfig
from deeplabzoo.inference.large_image import read_input
from deeplabzoo.models.deeplab import DeepLab
from deeplabzoo.processing.preprocessing import image_labels, prepare
from tools.docs.compatibility import GROUPS, PAGE, Row, cells, compatibility_page
from tools.docs.compatibility_cases import Case

SAME_LABELS = 0.999
"""Fraction of equal labels: an optimized model differs by rounding, which decides where two classes are equally likely."""


def image(channels: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Return 65 x 65 pixels with large and small structures: grey, RGB or another number of channels."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(1, channels, 5, 7, generator=generator)
    shapes = torch.nn.functional.interpolate(coarse, size=(65, 65), mode="bilinear")
    grain = torch.rand(1, channels, 65, 65, generator=generator)
    pixels = (255 * (0.7 * shapes + 0.3 * grain)).to(torch.uint8)[0].permute(1, 2, 0).numpy()
    return pixels[:, :, 0] if channels == 1 else pixels


class OneImage:
    """A dataset of one RGB image for the classes of a model."""

    name, split, ignore_index, names = "one", "val", 255, ("image",)

    def __init__(self, net: DeepLab) -> None:
        self.classes, self.palette = net.classes, net.palette
        self.truth_HW = np.random.default_rng(0).integers(0, len(net.classes), (65, 65), dtype=np.uint8)

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> Sample:
        return Sample(image(3), self.truth_HW, "image")

    def read_labels(self, index: int) -> Any:
        return self.truth_HW


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Row], Case]:
    """The file or model of a row, made once."""
    cases: dict[str, Case] = {}

    def case(row: Row) -> Case:
        if row.id not in cases:
            cases[row.id] = row.build(tmp_path_factory.mktemp(row.id))
        return cases[row.id]

    return case


@functools.cache
def loaded(file: Path, name: str | None) -> DeepLab:
    return deeplabzoo.load(file) if name is None else deeplabzoo.create(name, pretrained=file)


def model_of(case: Case) -> Any:
    return case.model if case.file is None else loaded(case.file, case.name)


def plain_labels(case: Case, pixels: Any) -> Any:
    """Return the labels of the original model, without anything that optimizes it."""
    net = case.expected
    # a library's file brings its library's preprocessing
    preprocessing = net.preprocessing if case.file is None else model_of(case).preprocessing
    read, _ = read_input(pixels, net.config.in_chans, max_pixels=10_000)
    with torch.inference_mode():
        labels_HW = image_labels(net, prepare(read, preprocessing, channels=net.config.in_chans))
    # of a file, all tensors are compared as well
    assert case.file is not None or len(np.unique(labels_HW)) > 1, "one label everywhere proves nothing"
    return labels_HW


def require_same_tensors(net: DeepLab, expected: DeepLab) -> None:
    given, right = net.state_dict(), expected.state_dict()
    assert given.keys() == right.keys()
    assert [name for name, tensor in right.items() if not torch.equal(given[name], tensor)] == []


def check_load(case: Case, folder: Path) -> None:
    net = model_of(case)
    require_same_tensors(net, case.expected)
    assert not net.training


def check_predict(case: Case, folder: Path) -> None:
    pixels = image(case.expected.config.in_chans)
    labels_HW = deeplabzoo.Predictor(model_of(case), "cpu")(pixels).labels
    assert (labels_HW == plain_labels(case, pixels)).mean() >= SAME_LABELS


def check_evaluate(case: Case, folder: Path) -> None:
    data = OneImage(case.expected)
    report = deeplabzoo.evaluate(model_of(case), data, progress=False, device="cpu")
    counts = np.zeros((len(data.classes), len(data.classes)), int)
    np.add.at(counts, (data.truth_HW, plain_labels(case, image(3))), 1)
    assert np.abs(np.asarray(report.confusion_matrix) - counts).sum() / 2 <= (1 - SAME_LABELS) * counts.sum()


def check_optimize(case: Case, folder: Path) -> None:
    net = case.expected
    fast = deeplabzoo.optimize(model_of(case))
    image_BCHW = torch.randn(1, net.config.in_chans, 65, 65, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        torch.testing.assert_close(fast(image_BCHW), net(image_BCHW), rtol=0, atol=1e-3 * float(net(image_BCHW).abs().max()))


def check_save(case: Case, folder: Path) -> None:
    model_of(case).save(folder / "saved.safetensors")
    require_same_tensors(deeplabzoo.load(folder / "saved.safetensors"), case.expected)


def check_export(case: Case, folder: Path) -> None:
    """`export` compares the file with the given model; here the file is compared with the original one."""
    onnxruntime = pytest.importorskip("onnxruntime")
    export(model_of(case), ExportConfig("onnx", folder / "model.onnx"))
    net = case.expected
    image_BCHW = torch.randn(1, net.config.in_chans, 65, 97, generator=torch.Generator().manual_seed(0))
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    (logits_BCHW,) = session.run(None, {"image": image_BCHW.numpy()})
    with torch.inference_mode():
        right_BCHW = net(image_BCHW)
    assert np.abs(logits_BCHW - right_BCHW.numpy()).max() <= 1e-3 * float(right_BCHW.abs().max())


CHECKS: dict[str, Callable[[Case, Path], None]] = {
    "load": check_load,
    "predict": check_predict,
    "evaluate": check_evaluate,
    "optimize": check_optimize,
    "save": check_save,
    "export": check_export,
}


@pytest.mark.parametrize(("row", "column", "error"), [pytest.param(*cell, id=f"{cell[0].id}-{cell[1]}") for cell in cells()])
def test_a_cell_of_the_page_is_what_happens(
    row: Row, column: str, error: str, build: Callable[[Row], Case], tmp_path: Path
) -> None:
    """A yes: the tensors, labels and scores of the original model; a no: one sentence that contains what the page quotes."""
    case = build(row)
    if not error:
        CHECKS[column](case, tmp_path)
        return
    with pytest.raises(DeepLabZooError) as raised:
        CHECKS[column](case, tmp_path)
    assert error in str(raised.value)
    assert "\n" not in str(raised.value)


def test_the_page_is_what_the_tool_writes() -> None:
    """`python -m tools.docs.compatibility` leaves docs/compatibility.md unchanged."""
    assert compatibility_page() == PAGE.read_text(encoding="utf-8")


def test_every_row_has_its_own_name() -> None:
    """Two rows of one name would share a file."""
    names = [row.id for group in GROUPS for row in group.rows]
    assert len(names) == len(set(names))
