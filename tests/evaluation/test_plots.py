"""`evaluate --plots`: the confusion matrix, IoU by class and the worst pictures, drawn from the report that was printed."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

import deeplabzoo
from deeplabzoo.cli.evaluate import main
from deeplabzoo.data.dataset import Sample
from deeplabzoo.data.datasets.synthetic_shapes import SyntheticShapes
from deeplabzoo.evaluation import plots
from deeplabzoo.evaluation.plots import WorstImages, draw_plots
from deeplabzoo.evaluation.report import Report

CLASSES = ("background", "cat", "dog", "fish")
PALETTE = ((0, 0, 0), (200, 0, 0), (0, 200, 0), (0, 0, 200))
FILES = {"confusion_matrix.png", "per_class_iou.png", "worst_images.png"}


def picture(true: list[list[int]], predicted: list[list[int]], name: str = "one") -> tuple[Sample, np.ndarray]:
    labels = np.array(true, np.uint8)
    return Sample(np.zeros((*labels.shape, 3), np.uint8), labels, name), np.array(predicted, np.uint8)


@pytest.fixture(scope="module")
def scored() -> tuple[Report, WorstImages, SyntheticShapes]:
    torch.manual_seed(0)
    config = deeplabzoo.DeepLabConfig(
        architecture="deeplabv3", encoder="lcnet_050", num_classes=4, head_channels=16, output_stride=8
    )
    data = SyntheticShapes("val", (48, 64), 5)
    worst = WorstImages(3, 4, data.ignore_index)
    report = deeplabzoo.evaluate(
        deeplabzoo.DeepLab(config).eval(), data, progress=False, device="cpu", engine=None, seen=worst.add
    )
    return report, worst, data


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that were drawn, so that a test reads what stands in them."""
    drawn: list[Figure] = []
    save = plots._save

    def keep(figure: Figure, path: Path) -> Path:
        drawn.append(figure)
        return save(figure, path)

    monkeypatch.setattr(plots, "_save", keep)
    return drawn


def test_the_worst_are_those_of_lowest_miou() -> None:
    """Scored one by one, void left out; the worst first, of equal ones the earlier."""
    worst = WorstImages(2, 4, 255)
    right = picture([[0, 1]], [[0, 1]], "right")
    half = picture([[0, 1]], [[0, 2]], "half")
    wrong = picture([[0, 1]], [[1, 0]], "wrong")
    void = picture([[255, 255]], [[1, 0]], "void")
    again = picture([[0, 1]], [[0, 2]], "half again")
    for sample, predicted in (right, half, void, wrong, again):
        worst.add(sample, predicted)
    ranked = worst.ranked()
    assert [one.sample.name for one in ranked] == ["wrong", "half"]
    assert [one.miou for one in ranked] == [0, pytest.approx(1 / 3)]
    assert ranked[1].iou == (1.0, 0.0, 0.0, None)


def test_every_sample_is_seen_with_its_prediction(scored: tuple[Report, WorstImages, SyntheticShapes]) -> None:
    """What `seen` is given adds up to the report's own matrix."""
    report, _, data = scored
    everything = WorstImages(len(data), 4, data.ignore_index)
    torch.manual_seed(0)
    net = deeplabzoo.DeepLab(
        deeplabzoo.DeepLabConfig(
            architecture="deeplabv3", encoder="lcnet_050", num_classes=4, head_channels=16, output_stride=8
        )
    ).eval()
    again = deeplabzoo.evaluate(net, data, progress=False, device="cpu", engine=None, seen=everything.add)
    assert again.confusion_matrix == report.confusion_matrix
    counts = np.zeros((4, 4), np.int64)
    for one in everything.ranked():
        scored_pixels = one.sample.labels != data.ignore_index
        np.add.at(counts, (one.sample.labels[scored_pixels], one.predicted[scored_pixels]), 1)
    assert counts.tolist() == [list(row) for row in report.confusion_matrix]


@pytest.mark.parametrize("palette", ["data", "safe"])
def test_three_plots_are_written(scored: tuple[Report, WorstImages, SyntheticShapes], tmp_path: Path, palette: str) -> None:
    report, worst, data = scored
    paths = draw_plots(report, worst.ranked(), tmp_path, data_palette=data.palette, palette=palette)  # type: ignore[arg-type]
    assert {path.name for path in paths} == {path.name for path in tmp_path.iterdir()} == FILES
    for path in paths:
        with Image.open(path) as opened:
            assert min(opened.size) > 200
            assert len(opened.convert("RGB").getcolors(2**24) or []) > 3


def test_the_matrix_is_normalised_by_the_true_class(
    scored: tuple[Report, WorstImages, SyntheticShapes], tmp_path: Path, figures: list[Figure]
) -> None:
    """Rows sum to 100 %, a class without true pixels is empty, axes and scale say what they are."""
    report = dataclasses.replace(
        scored[0], classes=CLASSES, confusion_matrix=((75, 25, 0, 0), (0, 10, 0, 0), (0, 0, 0, 0), (50, 0, 0, 150))
    )
    plots._plot_confusion_matrix(report, tmp_path / "matrix.png")
    axes, bar = figures[0].axes
    shown = np.ma.filled(axes.images[0].get_array(), np.nan)
    assert np.array_equal(shown, [[75, 25, 0, 0], [0, 100, 0, 0], [np.nan] * 4, [25, 0, 0, 75]], equal_nan=True)
    assert [text.get_text() for text in axes.texts] == ["75", "25", "100", "25", "75"]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("predicted class", "true class")
    assert [label.get_text() for label in axes.get_yticklabels()] == list(CLASSES)
    assert "%" in bar.get_ylabel()
    assert "no true pixel" in bar.get_ylabel()
    assert axes.images[0].get_cmap().name == "cividis"


def test_bars_stand_in_order_with_their_numbers(
    scored: tuple[Report, WorstImages, SyntheticShapes], tmp_path: Path, figures: list[Figure]
) -> None:
    """Best on top, the mean as a line, absent classes named and not drawn as zero."""
    scores = dataclasses.replace(scored[0].scores, miou=0.5, per_class_iou=(0.9, 0.1, None, 0.5), absent_classes=(2,))
    report = dataclasses.replace(scored[0], classes=CLASSES, scores=scores)
    plots._plot_per_class_iou(report, tmp_path / "bars.png")
    (axes,) = figures[0].axes
    assert [round(bar.get_width()) for bar in axes.patches] == [10, 50, 90]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["cat", "fish", "background"]
    assert axes.get_xlabel() == "IoU (%); absent: dog"
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["mean 50.00 %"]


def test_the_montage_shows_input_truth_and_prediction(
    scored: tuple[Report, WorstImages, SyntheticShapes], tmp_path: Path, figures: list[Figure]
) -> None:
    """Side by side in the same colours, void apart, a legend with the IoU of that picture; safe is Okabe and Ito's palette."""
    sample, predicted = picture([[0, 0, 1, 1], [0, 0, 255, 3]], [[0, 0, 1, 2], [0, 0, 1, 3]], "2007_000001")
    worst = WorstImages(2, 4, 255)
    worst.add(sample, predicted)
    report = dataclasses.replace(scored[0], classes=CLASSES)
    for palette in plots.PALETTES:
        plots._plot_worst_images(report, worst.ranked(), tmp_path / "worst.png", PALETTE, palette)
    data, safe = figures
    photo, truth, prediction, legend = data.axes
    assert [axes.get_title() for axes in (photo, truth, prediction)] == ["input", "truth", "prediction"]
    assert photo.get_ylabel() == "2007_000001\nmIoU 62.5 %"
    assert np.array_equal(truth.images[0].get_array()[0], [PALETTE[0], PALETTE[0], PALETTE[1], PALETTE[1]])
    assert tuple(truth.images[0].get_array()[1, 2]) == plots._VOID
    assert tuple(prediction.images[0].get_array()[0, 3]) == PALETTE[2]
    logged = [text.get_text() for text in legend.get_legend().get_texts()]
    assert logged == ["background  100 %", "cat  50 %", "fish  100 %", "dog  0 %", "not scored"]
    colors = {tuple(color) for axes in safe.axes[1:3] for color in axes.images[0].get_array().reshape(-1, 3).tolist()}
    assert colors == {plots._SAFE_BACKGROUND, plots._VOID, *plots._SAFE[:3]}


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A folder data set of four pictures, and the weights of a network for it."""
    root = tmp_path_factory.mktemp("labelled")
    drawn = SyntheticShapes("val", (48, 64), 4, classes=2)
    for index in range(4):
        for folder, pixels in (("images", drawn[index].image), ("masks", drawn[index].labels)):
            (root / "val" / folder).mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(root / "val" / folder / f"{index}.png")
    torch.manual_seed(0)
    config = deeplabzoo.DeepLabConfig(architecture="deeplabv3", encoder="lcnet_050", num_classes=2, head_channels=16)
    deeplabzoo.DeepLab(config, classes=("background", "thing")).eval().save(root / "net.safetensors")
    return root, root / "net.safetensors"


def test_the_command_draws_what_it_prints(
    labelled: tuple[Path, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """And the report is the same as without pictures."""
    root, net = labelled
    call = [str(net), "--data", "folder", "--root", str(root), "--device", "cpu"]
    assert main([*call, "--json", str(tmp_path / "without.json")]) == 0
    out = tmp_path / "deep" / "plots"
    assert main([*call, "--json", str(tmp_path / "with.json"), "--plots", str(out), "--palette", "safe"]) == 0
    assert {path.name for path in out.iterdir()} == FILES
    assert caplog.text.count("wrote ") == 3
    with_plots, without = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("with", "without"))
    for changing in ("command", "date", "seconds"):
        del with_plots[changing], without[changing]
    assert with_plots == without


def test_a_place_that_is_no_folder_is_refused_before_the_work(
    labelled: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    call = ["missing.safetensors", "--data", "folder", "--root", str(labelled[0]), "--plots", str(tmp_path / "file")]
    assert main(call) == 1
    assert "it is a file; name a folder" in capsys.readouterr().err


def test_without_matplotlib_one_sentence_names_the_extra(labelled: tuple[Path, Path], tmp_path: Path) -> None:
    """Found out before the pictures are read, and nothing else of the package needs it."""
    code = (
        "import importlib.util, sys\n"
        "find = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *rest: None if name == 'matplotlib' else find(name, *rest)\n"
        "from deeplabzoo.evaluate import main\n"
        f"sys.exit(main(['{labelled[1]}', '--data', 'folder', '--root', '{labelled[0]}', '--plots', '{tmp_path / 'p'}']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == 'error: --plots needs matplotlib; install it with `pip install "deeplabzoo[train]"`.\n'
    assert not (tmp_path / "p").exists()
