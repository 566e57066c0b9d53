"""Whether a released file still answers as it did and scores what its row says: golden logits first, the data set after them.

A row states a figure with its protocol, split and pictures; here it is measured again under these, and compared.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from deeplabzoo.data.base import DATA_NAMES, SegmentationData
from deeplabzoo.data.classes import PUBLISHED_SPLIT_SIZES, class_list
from deeplabzoo.data.finding import find_data
from deeplabzoo.errors import ChangedFileError, DataError, DeepLabZooError
from deeplabzoo.inference.evaluation import evaluate
from deeplabzoo.inference.golden import ROUNDING, golden_difference
from deeplabzoo.inference.report import Report, image_list_sha256
from deeplabzoo.models.deeplab import DeepLab
from deeplabzoo.zoo.factory import create
from deeplabzoo.zoo.manifest import Metric, WeightRow, weights_folder
from deeplabzoo.zoo.measured import FIGURES

POINTS = 0.1
"""Difference in percentage points up to which a figure counts as the same: other torch versions and processors move borders of
objects by single pixels, which moved no figure by more than a hundredth so far."""

VARIABLE = "DEEPLABZOO_DATA"
"""Environment variable that names the folder of data sets where none is given."""

Status = Literal["ok", "differs", "unverified"]


@dataclass(frozen=True)
class Finding:
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
    named = os.environ.get(VARIABLE)
    return given or (Path(named).expanduser() if named else None)


def verify(
    row: WeightRow, folder: Path | None, *, tolerance: float = POINTS, device: str | torch.device = "auto"
) -> Iterator[Finding]:
    """Yield what is found about a row, its golden logits first, as it is found; every figure gets a finding.

    `folder` is, or directly contains, the data sets. Weights are fetched only where there is something to compare with, and
    where their logits have changed, figures are not measured.
    """
    golden = weights_folder() / f"{row.full_name}.golden.safetensors"
    figures = [(alike, _data(alike[0], row, folder)) for alike in _alike(row.metrics)]
    absent = [(alike, data) for alike, data in figures if isinstance(data, DataError)]
    if golden.is_file() or len(absent) < len(figures):  # else there is nothing that a download of the weights would show
        try:
            net = create(row.full_name, pretrained=True)
        except DeepLabZooError as error:
            status: Status = "differs" if isinstance(error, ChangedFileError) else "unverified"
            yield Finding(row, status, f"the weights cannot be had: {error}")
            return
        if golden.is_file():
            yield (found := _golden(row, net, golden))
            if found.status == "differs":
                return
        for alike, data in figures:
            if not isinstance(data, DataError):
                yield from _measured(row, net, alike, data, tolerance, device)
    for alike, reason in absent:
        yield from (Finding(row, "unverified", f"{_stated(one)}: {reason}") for one in alike)
    if not row.metrics:
        yield Finding(row, "unverified", "its row states no figure")


def _golden(row: WeightRow, net: DeepLab, golden: Path) -> Finding:
    try:
        difference = golden_difference(net, golden)
    except DeepLabZooError as error:
        return Finding(row, "differs", str(error))
    detail = f"golden logits, largest difference {difference:.1g} of the largest logit (rounding: up to {ROUNDING:g})"
    return Finding(row, "ok" if difference <= ROUNDING else "differs", detail, difference)


def _alike(metrics: Sequence[Metric]) -> list[list[Metric]]:
    """Return figures in groups that one pass over the pictures measures."""
    groups: dict[tuple[Any, ...], list[Metric]] = {}
    for one in metrics:
        conditions = (one.data, one.split, one.images, one.image_list_sha256, one.output_stride, one.scales, one.flip)
        groups.setdefault(conditions, []).append(one)
    return list(groups.values())


def _measured(
    row: WeightRow,
    net: DeepLab,
    metrics: Sequence[Metric],
    data: SegmentationData,
    tolerance: float,
    device: str | torch.device,
) -> Iterator[Finding]:
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
        yield from (Finding(row, "unverified", f"{_stated(one)}: {error}") for one in metrics)
        return
    yield from (_compared(row, one, report, tolerance) for one in metrics)


def _compared(row: WeightRow, metric: Metric, report: Report, tolerance: float) -> Finding:
    if metric.name not in FIGURES:
        return Finding(row, "unverified", f"{_stated(metric)}: no report has a figure of this name")
    if metric.origin == "measured" and str(report.protocol) != metric.protocol:
        return Finding(row, "differs", f"{_stated(metric)}: the protocol is now '{report.protocol}', was '{metric.protocol}'")
    again = round(100 * float(getattr(report, FIGURES[metric.name])), 2)
    difference = round(abs(again - metric.value), 2)
    detail = f"{_stated(metric)}: measured again {again:.2f} %, a difference of {difference:.2f} (allowed: {tolerance:g})"
    return Finding(row, "ok" if difference <= tolerance else "differs", detail, difference)


def _stated(metric: Metric) -> str:
    return f"{metric.name} {metric.value:.2f} % ({metric.origin}: {metric.data} {metric.split}, {metric.pictures})"


def _data(metric: Metric, row: WeightRow, folder: Path | None) -> SegmentationData | DataError:
    """Return the pictures that a figure stands on, or in a sentence why they are not to be had."""
    if metric.data not in DATA_NAMES:
        return DataError(f"no reader of '{metric.data}' is built in, only of {', '.join(DATA_NAMES)}.")
    count = metric.images or PUBLISHED_SPLIT_SIZES.get(metric.data, {}).get(metric.split)
    if count is None:
        return DataError("its row does not say on how many pictures it stands.")
    if folder is None:
        return DataError(f"its pictures are needed; name the folder that holds them by --data DIR or {VARIABLE}.")
    if not folder.is_dir():
        return DataError(f"the data folder '{folder}' does not exist; check --data or {VARIABLE}.")

    def wanted(data: SegmentationData) -> bool:
        return len(data) == count and metric.image_list_sha256 in (None, image_list_sha256(data.names))

    found = find_data(metric.data, metric.split, folder, class_list(row.data).classes, wanted)
    which = "its" if metric.image_list_sha256 else "as many as"
    return found or DataError(
        f"neither '{folder}' nor a folder in it is a data set '{metric.data}' whose split '{metric.split}' has {which} "
        f"{count} pictures; name another folder by --data DIR or {VARIABLE}."
    )
