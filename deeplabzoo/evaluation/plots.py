"""Plots of an evaluation: normalized confusion matrix, IoU of each class, and the worst images.

matplotlib is imported when a plot is drawn. The colour map of the matrix is cividis, which is readable with any colour vision;
`palette="safe"` draws the classes of an image in Okabe and Ito's colours instead of the dataset's own.
"""

import heapq
import io
import textwrap
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from deeplabzoo.data.classes import Palette
from deeplabzoo.data.dataset import Sample
from deeplabzoo.data.image_io import Labels, Pixels
from deeplabzoo.errors import printable
from deeplabzoo.evaluation.metrics import ConfusionMatrix
from deeplabzoo.evaluation.report import Report
from deeplabzoo.files import write_atomically
from deeplabzoo.inference.visualization import Color, is_background
from deeplabzoo.log import logger
from deeplabzoo.optional_imports import require_module


@dataclass(frozen=True, order=True)
class ScoredImage:
    """An image, its prediction and its scores; ordered by error, so that a heap drops the best one first."""

    miou_error: float
    """1 - mIoU over the classes in this image's labels or prediction."""
    order: int
    sample: Sample = field(compare=False)
    predicted: Labels = field(compare=False)
    iou: tuple[float | None, ...] = field(compare=False)
    """By class; None where it is absent."""

    @property
    def miou(self) -> float:
        """Mean IoU of this image alone, 0...1."""
        return 1 - self.miou_error


class WorstImages:
    """Keeps the `count` images of lowest mIoU; of equal ones the first."""

    def __init__(self, count: int, num_classes: int, ignore_index: int) -> None:
        self.count, self.num_classes, self.ignore_index = count, num_classes, ignore_index
        self._heap: list[ScoredImage] = []
        self._seen = 0

    def add(self, sample: Sample, predicted: Labels) -> None:
        """Score one image and keep it if it is among the worst; an image without labelled pixels is skipped."""
        matrix = ConfusionMatrix(self.num_classes, self.ignore_index)
        matrix.update(predicted, sample.labels)
        self._seen += 1
        if not matrix.counts.any():
            return
        scores = matrix.scores()
        heapq.heappush(self._heap, ScoredImage(1 - scores.miou, -self._seen, sample, predicted, tuple(scores.per_class_iou)))
        if len(self._heap) > self.count:
            heapq.heappop(self._heap)

    def ranked(self) -> list[ScoredImage]:
        """Return the kept images, the worst first."""
        return sorted(self._heap, reverse=True)


PlotPalette = Literal["data", "safe"]
PALETTES: tuple[PlotPalette, ...] = ("data", "safe")
NUM_WORST_IMAGES = 6
"""Images in the montage of the worst."""

_SAFE: tuple[Color, ...] = (
    (230, 159, 0),
    (86, 180, 233),
    (0, 158, 115),
    (240, 228, 66),
    (0, 114, 178),
    (213, 94, 0),
    (204, 121, 167),
)
"""Okabe and Ito's colours without black, distinguishable with any colour vision."""
_SAFE_BACKGROUND: Color = (45, 45, 45)
_OTHER_COLOR: Color = (140, 140, 140)
_VOID: Color = (238, 238, 238)
_BAR, _MEAN = "#0072B2", "#D55E00"
_MAX_ANNOTATED_CLASSES = 32
"""Classes up to which each cell of the matrix has its number."""
_MAX_LEGEND_CLASSES = 9
"""Classes named beside an image of the montage; the others are counted."""


def draw_plots(
    report: Report, worst: Sequence[ScoredImage], folder: Path, *, data_palette: Palette, palette: PlotPalette = "data"
) -> list[Path]:
    """Write confusion_matrix.png, per_class_iou.png and worst_images.png into a folder and return their paths.

    Raises DeepLabZooError where matplotlib is missing, OutputError where a file cannot be written.
    """
    require_matplotlib()
    return [
        _plot_confusion_matrix(report, folder / "confusion_matrix.png"),
        _plot_per_class_iou(report, folder / "per_class_iou.png"),
        _plot_worst_images(report, worst, folder / "worst_images.png", data_palette, palette),
    ]


def require_matplotlib() -> None:
    """Raise DeepLabZooError that names the extra if matplotlib is missing; called before the evaluation."""
    require_module("matplotlib", extra="train", purpose="--plots")


def _plot_confusion_matrix(report: Report, path: Path) -> Path:
    counts = np.array(report.confusion_matrix, np.float64)
    true = counts.sum(axis=1, keepdims=True)
    share = np.divide(100 * counts, true, out=np.full_like(counts, np.nan), where=true > 0)
    names = [_short(name) for name in report.classes]
    side = max(5.0, 0.42 * len(names)) if len(names) <= _MAX_ANNOTATED_CLASSES else max(12.0, 0.13 * len(names))
    font = 8.5 if len(names) <= _MAX_ANNOTATED_CLASSES else 5.5
    figure = _figure(side + 3.2, side + 1.8)
    axes = figure.add_subplot()
    axes.set_facecolor("#d9d9d9")  # rows of classes without a true pixel
    shown = axes.imshow(share, cmap="cividis", vmin=0, vmax=100)
    axes.set_xticks(range(len(names)), names, rotation=90, fontsize=font)
    axes.set_yticks(range(len(names)), names, fontsize=font)
    if len(names) <= _MAX_ANNOTATED_CLASSES:
        for row, column in zip(*np.nonzero(share >= 0.5), strict=True):  # a NaN is no number and no cell
            value = share[row, column]
            axes.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=7, color=_text_color(value))
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    bar = figure.colorbar(shown, ax=axes, fraction=0.046, pad=0.02)
    grey = "; grey: no true pixel" if np.isnan(share).any() else ""
    bar.set_label(f"share of the true class's pixels (%), a row sums to 100{grey}")
    _title(figure, report, "Normalized confusion matrix", int(9 * (side + 3.2)))
    return _save(figure, path)


def _plot_per_class_iou(report: Report, path: Path) -> Path:
    found = sorted(((iou, name) for name, iou in report.per_class.items() if iou is not None), key=lambda one: one[0])
    figure = _figure(8, 1.9 + 0.23 * len(found))
    axes = figure.add_subplot()
    axes.barh([_short(name) for _, name in found], [100 * iou for iou, _ in found], color=_BAR, height=0.75)
    for place, (iou, _) in enumerate(found):
        behind = {"facecolor": "white", "edgecolor": "none", "pad": 0.8}  # the line of the mean passes below the number
        axes.text(100 * iou + 0.8, place, f"{100 * iou:.1f}", va="center", fontsize=8, bbox=behind)
    axes.axvline(100 * report.miou, color=_MEAN, linewidth=1.5, linestyle="--", label=f"mean {100 * report.miou:.2f} %")
    axes.set_xlim(0, 108)
    axes.set_ylim(-0.6, len(found) - 0.4)
    axes.set_xticks(range(0, 101, 20))
    axes.set_xlabel("IoU (%)" + (f"; absent: {', '.join(report.absent_classes)}" if report.absent_classes else ""))
    axes.tick_params(axis="y", labelsize=9, length=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0)
    _title(figure, report, "IoU of each class", 84)
    return _save(figure, path)


def _plot_worst_images(
    report: Report, worst: Sequence[ScoredImage], path: Path, data_palette: Palette, palette: PlotPalette
) -> Path:
    from matplotlib.patches import Patch

    rows = max(1, len(worst))
    figure = _figure(13, 1.1 + 2.7 * rows)
    grid = figure.subplots(rows, 4, squeeze=False, width_ratios=[1, 1, 1, 0.62])
    for axes, title in zip(grid[0], ("input", "truth", "prediction", ""), strict=True):
        axes.set_title(title)
    for (image, truth, predicted, legend), one in zip(grid, worst, strict=True):
        ranked = _classes_by_area(one, report.protocol.ignore_index)
        colors = _colors(ranked, report.classes, data_palette, palette)
        image.imshow(one.sample.image)
        truth.imshow(_colorize(one.sample.labels, colors))
        predicted.imshow(_colorize(one.predicted, colors))
        image.set_ylabel(f"{_short(one.sample.name)}\nmIoU {100 * one.miou:.1f} %", fontsize=9)
        entries = [
            Patch(
                facecolor=_unit_rgb(colors[index]), edgecolor="#555555", label=_iou_label(report.classes[index], one.iou[index])
            )
            for index in ranked[:_MAX_LEGEND_CLASSES]
        ]
        if len(ranked) > _MAX_LEGEND_CLASSES:
            entries.append(Patch(facecolor="white", edgecolor="white", label=f"and {len(ranked) - _MAX_LEGEND_CLASSES} more"))
        if (one.sample.labels == report.protocol.ignore_index).any():
            entries.append(Patch(facecolor=_unit_rgb(_VOID), edgecolor="#555555", label="not scored"))
        legend.legend(handles=entries, loc="center left", frameon=False, fontsize=9, borderaxespad=0, title="class, IoU here")
    for axes in grid.flat:
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
    _title(figure, report, f"The {len(worst)} images of lowest mIoU, the worst first", 130)
    return _save(figure, path)


def _classes_by_area(one: ScoredImage, ignore_index: int) -> list[int]:
    """Return the classes of an image's labels and prediction, the largest first."""
    both = np.concatenate([one.sample.labels[one.sample.labels != ignore_index].ravel(), one.predicted.ravel()])
    return [int(index) for index in np.argsort(-np.bincount(both), kind="stable") if (both == index).any()]


def _colors(ranked: Sequence[int], classes: Sequence[str], data_palette: Palette, palette: PlotPalette) -> dict[int, Color]:
    if palette == "data":
        return {index: data_palette[index] for index in ranked}
    things = [index for index in ranked if not is_background(classes[index])]
    colors = {index: _SAFE[place] if place < len(_SAFE) else _OTHER_COLOR for place, index in enumerate(things)}
    return {**dict.fromkeys(ranked, _SAFE_BACKGROUND), **colors}


def _colorize(labels_HW: Labels, colors: dict[int, Color]) -> Pixels:
    painted = np.full((*labels_HW.shape, 3), _VOID, np.uint8)
    for index, color in colors.items():
        painted[labels_HW == index] = color
    return painted


def _iou_label(name: str, iou: float | None) -> str:
    return f"{_short(name)}  {'absent' if iou is None else f'{100 * iou:.0f} %'}"


def _short(name: str) -> str:
    """Return the first of several synonyms, at most 22 characters, with dollar signs escaped (matplotlib reads formulas)."""
    first = printable(name.split(";")[0].split(",")[0].strip())
    return (first if len(first) <= 22 else f"{first[:21].rstrip()}…").replace("$", r"\$")


def _text_color(percent: float) -> str:
    return "black" if percent > 55 else "white"


def _unit_rgb(color: Color) -> tuple[float, float, float]:
    red, green, blue = color
    return red / 255, green / 255, blue / 255


def _figure(width_in: float, height_in: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width_in, height_in), layout="constrained")


def _title(figure: Any, report: Report, what: str, columns: int) -> None:
    images = report.subset or f"{report.images} images"
    where = printable(f"{report.model} on {report.data} {report.split} ({images}): mIoU {100 * report.miou:.2f} %")
    where = where.replace("$", r"\$")
    figure.suptitle(f"{what}\n{textwrap.fill(where, columns)}", fontsize=11)


def _save(figure: Any, path: Path) -> Path:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    image = io.BytesIO()
    FigureCanvasAgg(figure)
    with warnings.catch_warnings(record=True) as met:
        warnings.filterwarnings("always", "Glyph .* missing from font")
        figure.savefig(image, dpi=110, format="png")
    missing = [one for one in met if "missing from font" in str(one.message)]
    for one in met:
        if one not in missing:
            warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)
    if missing:
        logger.warning(f"{path.name}: the font lacks letters of the names, which are drawn as boxes")
    write_atomically(path, lambda file: file.write(image.getvalue()))
    return path
