"""Reproduction of published metrics: golden logits first, then the dataset under the published protocol.

A row states metrics with protocol, split and images; they are measured again under the same conditions and compared.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from safetensors.torch import save as serialise

from deeplabzoo.checkpoints.native import read_safetensors
from deeplabzoo.data.classes import PUBLISHED_SPLIT_SIZES, class_list
from deeplabzoo.data.dataset import DATASET_NAMES, SegmentationDataset, find_dataset
from deeplabzoo.device import eval_mode
from deeplabzoo.errors import ChangedFileError, DataError, DeepLabZooError, WeightsError
from deeplabzoo.evaluation.evaluate import evaluate
from deeplabzoo.evaluation.report import METRIC_FIELDS, Report, image_list_sha256
from deeplabzoo.files import write_atomically
from deeplabzoo.hub.factory import create
from deeplabzoo.hub.manifest import Metric, WeightRow, weights_folder
from deeplabzoo.models.deeplab import DeepLab

if TYPE_CHECKING:
    from deeplabzoo.models.deeplab import DeepLab


# Golden logits: a model's output for one fixed tensor, kept in a small file, so that drift is a number. The input is computed,
# not random, as random generators change between versions; it has no preprocessing, and the output is the head's, before
# upsampling.


GOLDEN_HW = (97, 129)
"""Odd sides of the form stride x n + 1, at which feature grids are nested."""
GOLDEN_TOLERANCE = 1e-4
"""Of the largest logit: how much float32 arithmetic of other machines and libraries moves logits at most.

A product or sum rounds by u = 2^-24 = 6e-8, a sum of n products by about sqrt(n) u, 8e-6 for the longest (n = 18432), and a
hundred layers, whose errors are independent, by sqrt(100) times that."""
_FORMAT = "deeplabzoo golden logits"


def golden_input(in_chans: int = 3, size: tuple[int, int] = GOLDEN_HW) -> torch.Tensor:
    """Return the fixed tensor, 1 x in_chans x H x W float32 in -2...2: smooth ramps with a fine pattern on top.

    >>> golden_input()[0, :, 0, 1].tolist()
    [-1.703125, -1.046875, -0.390625]
    """
    height, width = size
    channel_C11 = torch.arange(in_chans, dtype=torch.int64)[:, None, None]
    row_H1, column_W = torch.arange(height, dtype=torch.int64)[:, None], torch.arange(width, dtype=torch.int64)
    ramp_CHW = (2 * row_H1 + 3 * column_W + 41 * channel_C11) % 193
    fine_CHW = (7 * row_H1 * column_W + 16 * column_W + row_H1 + channel_C11) % 64
    return ((ramp_CHW + fine_CHW - 128).to(torch.float32) / 64)[None]


def save_golden(net: "DeepLab", path: str | Path) -> None:
    """Write the network's low-resolution float32 logits of `golden_input` to `path`; raises OutputError."""
    metadata = {"format": _FORMAT, "input": f"{GOLDEN_HW[0]}x{GOLDEN_HW[1]}", "output_stride": str(net.output_stride)}
    content = serialise({"logits": _golden_logits(net, GOLDEN_HW).cpu().contiguous()}, metadata)
    write_atomically(Path(path), lambda file: file.write(content))


def golden_difference(net: "DeepLab", file: str | Path) -> float:
    """Return the largest difference between the network's logits and the golden ones, as a share of the largest golden logit.

    The same weights differ by rounding alone, float16 ones from those they were made of by a little more. Raises WeightsError
    for a file that is none of ours, or of a network with other classes or another output stride.
    """
    metadata, tensors = read_safetensors(Path(file))
    try:
        if metadata["format"] != _FORMAT:
            raise ValueError
        height, width = (int(side) for side in metadata["input"].split("x"))
        golden, output_stride = tensors["logits"], int(metadata["output_stride"])
    except (KeyError, ValueError):
        raise WeightsError(f"'{file}' does not hold golden logits; `python -m deeplabzoo.publish` writes such files.") from None
    if net.output_stride != output_stride:
        raise WeightsError(f"'{file}' was written at output stride {output_stride}, the network runs at {net.output_stride}.")
    logits = _golden_logits(net, (height, width)).cpu()
    if logits.shape != golden.shape:
        raise WeightsError(f"'{file}' holds logits of shape {tuple(golden.shape)}, the network gives {tuple(logits.shape)}.")
    return float((logits - golden).abs().max() / golden.abs().max().clamp(min=1e-12))


def _golden_logits(net: "DeepLab", size: tuple[int, int]) -> torch.Tensor:
    with eval_mode(net):
        image_1CHW = golden_input(net.config.in_chans, size).to(next(net.parameters()).device)
        return net.forward_low_resolution(image_1CHW).float()


TOLERANCE_POINTS = 0.1
"""Difference in percentage points up to which a figure counts as the same: other torch versions and processors move borders of
objects by single pixels, which moved no figure by more than a hundredth so far."""

DATA_VARIABLE = "DEEPLABZOO_DATA"
"""Environment variable that names the folder of data sets where none is given."""

Status = Literal["ok", "differs", "unverified"]


@dataclass(frozen=True)
class ReproductionResult:
    """What became of the golden logits or of one figure of a row."""

    row: WeightRow
    status: Status
    detail: str
    difference: float | None = None
    """In points for a figure, as a share of the largest logit for golden logits; None where nothing was compared."""

    def __str__(self) -> str:
        return f"{self.status:<10} {self.row.full_name}: {self.detail}"


def data_folder(given: Path | None) -> Path | None:
    """Return the folder of data sets: the given one, else that of the environment variable, else None."""
    named = os.environ.get(DATA_VARIABLE)
    return given or (Path(named).expanduser() if named else None)


def verify(
    row: WeightRow, folder: Path | None, *, tolerance: float = TOLERANCE_POINTS, device: str | torch.device = "auto"
) -> Iterator[ReproductionResult]:
    """Yield what is found about a row, its golden logits first, as it is found; every figure gets a finding.

    `folder` is, or directly contains, the data sets. Weights are fetched only where there is something to compare with, and
    where their logits have changed, figures are not measured.
    """
    golden = weights_folder() / f"{row.full_name}.golden.safetensors"
    figures = [(alike, _data(alike[0], row, folder)) for alike in _grouped_by_protocol(row.metrics)]
    absent = [(alike, data) for alike, data in figures if isinstance(data, DataError)]
    if golden.is_file() or len(absent) < len(figures):  # else there is nothing that a download of the weights would show
        try:
            net = create(row.full_name, pretrained=True)
        except DeepLabZooError as error:
            status: Status = "differs" if isinstance(error, ChangedFileError) else "unverified"
            yield ReproductionResult(row, status, f"the weights cannot be had: {error}")
            return
        if golden.is_file():
            yield (found := _golden(row, net, golden))
            if found.status == "differs":
                return
        for alike, data in figures:
            if not isinstance(data, DataError):
                yield from _remeasured(row, net, alike, data, tolerance, device)
    for alike, reason in absent:
        yield from (ReproductionResult(row, "unverified", f"{_published_score(one)}: {reason}") for one in alike)
    if not row.metrics:
        yield ReproductionResult(row, "unverified", "its row states no figure")


def _golden(row: WeightRow, net: DeepLab, golden: Path) -> ReproductionResult:
    try:
        difference = golden_difference(net, golden)
    except DeepLabZooError as error:
        return ReproductionResult(row, "differs", str(error))
    detail = f"golden logits, largest difference {difference:.1g} of the largest logit (rounding: up to {GOLDEN_TOLERANCE:g})"
    return ReproductionResult(row, "ok" if difference <= GOLDEN_TOLERANCE else "differs", detail, difference)


def _grouped_by_protocol(metrics: Sequence[Metric]) -> list[list[Metric]]:
    """Return metrics in groups that one pass over the images measures."""
    groups: dict[tuple[Any, ...], list[Metric]] = {}
    for one in metrics:
        conditions = (one.data, one.split, one.images, one.image_list_sha256, one.output_stride, one.scales, one.flip)
        groups.setdefault(conditions, []).append(one)
    return list(groups.values())


def _remeasured(
    row: WeightRow,
    net: DeepLab,
    metrics: Sequence[Metric],
    data: SegmentationDataset,
    tolerance: float,
    device: str | torch.device,
) -> Iterator[ReproductionResult]:
    first = metrics[0]
    try:
        report = evaluate(
            net,
            data,
            scales=first.scales,
            flip=first.flip,
            output_stride=first.output_stride,
            device=device,
            model=row.full_name,
        )
    except DeepLabZooError as error:
        yield from (ReproductionResult(row, "unverified", f"{_published_score(one)}: {error}") for one in metrics)
        return
    yield from (_compare_metric(row, one, report, tolerance) for one in metrics)


def _compare_metric(row: WeightRow, metric: Metric, report: Report, tolerance: float) -> ReproductionResult:
    if metric.name not in METRIC_FIELDS:
        return ReproductionResult(row, "unverified", f"{_published_score(metric)}: no report has a figure of this name")
    if metric.origin == "measured" and str(report.protocol) != metric.protocol:
        return ReproductionResult(
            row, "differs", f"{_published_score(metric)}: the protocol is now '{report.protocol}', was '{metric.protocol}'"
        )
    again = round(100 * float(getattr(report, METRIC_FIELDS[metric.name])), 2)
    difference = round(abs(again - metric.value), 2)
    detail = (
        f"{_published_score(metric)}: measured again {again:.2f} %, a difference of {difference:.2f} (allowed: {tolerance:g})"
    )
    return ReproductionResult(row, "ok" if difference <= tolerance else "differs", detail, difference)


def _published_score(metric: Metric) -> str:
    return f"{metric.name} {metric.value:.2f} % ({metric.origin}: {metric.data} {metric.split}, {metric.images_text})"


def _data(metric: Metric, row: WeightRow, folder: Path | None) -> SegmentationDataset | DataError:
    """Return the dataset of a metric, or a DataError that says why it is not available."""
    if metric.data not in DATASET_NAMES:
        return DataError(f"no reader of '{metric.data}' is built in, only of {', '.join(DATASET_NAMES)}.")
    count = metric.images or PUBLISHED_SPLIT_SIZES.get(metric.data, {}).get(metric.split)
    if count is None:
        return DataError("its row does not state the number of images.")
    if folder is None:
        return DataError(f"its dataset is needed; name the folder that contains it by --data DIR or {DATA_VARIABLE}.")
    if not folder.is_dir():
        return DataError(f"the data folder '{folder}' does not exist; check --data or {DATA_VARIABLE}.")

    def wanted(data: SegmentationDataset) -> bool:
        return len(data) == count and metric.image_list_sha256 in (None, image_list_sha256(data.names))

    found = find_dataset(metric.data, metric.split, folder, class_list(row.data).classes, wanted)
    which = "its" if metric.image_list_sha256 else "as many as"
    return found or DataError(
        f"neither '{folder}' nor a folder in it is a data set '{metric.data}' whose split '{metric.split}' has {which} "
        f"{count} images; name another folder by --data DIR or {DATA_VARIABLE}."
    )
