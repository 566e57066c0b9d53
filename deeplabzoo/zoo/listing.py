"""Models and released files side by side, with what one chooses by: size, arithmetic, best figure and its protocol, licence."""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from deeplabzoo.data.classes import CLASS_LISTS
from deeplabzoo.errors import UnknownNameError, UsageError, did_you_mean
from deeplabzoo.models.encoder_table import encoder_facts
from deeplabzoo.zoo.catalogue import every_name
from deeplabzoo.zoo.costs import Cost, cost_of
from deeplabzoo.zoo.manifest import Metric, WeightRow, released, weights_folder
from deeplabzoo.zoo.registry import ModelName, list_models, list_weights, parse_name

Sort = Literal["name", "miou", "params", "flops", "size"]
SORTS: tuple[Sort, ...] = ("name", "miou", "params", "flops", "size")


@dataclass(frozen=True)
class Listed:
    """One line of a listing: a model, or one released file of it."""

    name: str
    model: ModelName
    row: WeightRow | None
    """The file that the figures are of: the one with the best mIoU, else the default one."""
    cost: Cost | None
    metric: Metric | None
    """The best mIoU of `row`; at the output stride asked for, where one was."""
    output_stride: int | None
    """That `flops` is counted at: the one asked for, else the weights' own, else 16 or the nearest there is."""

    @property
    def flops(self) -> int | None:
        """Floating-point operations for a photo of 513 x 513."""
        return self.cost.flops.get(self.output_stride) if self.cost and self.output_stride else None

    @property
    def params(self) -> int | None:
        """Parameters of the whole network."""
        return self.cost.params if self.cost else None

    @property
    def bytes(self) -> int | None:
        """Size of the file; None where there is none, or its publisher does not say."""
        return self.row.bytes if self.row else None

    def to_dict(self) -> dict[str, Any]:
        """Return the line as plain JSON values, named as in the manifest."""
        facts = encoder_facts(self.model.encoder)
        return {
            "name": self.name,
            "architecture": self.model.architecture,
            "encoder": facts.name,
            "data": self.model.data,
            "weights": self.row.full_name if self.row else None,
            "params": self.params,
            "flops_513": {str(stride): count for stride, count in self.cost.flops.items()} if self.cost else None,
            "output_stride": self.output_stride,
            "output_strides": list(facts.strides),
            "bytes": self.bytes,
            "miou": plain_metric(self.metric) if self.metric else None,
            "license": vars(self.row.license) if self.row else None,
        }


def listing(
    pattern: str = "*",
    *,
    output_stride: int | None = None,
    data: str | None = None,
    weights: bool = False,
    sort: Sort = "name",
) -> list[Listed]:
    """Return what matches: models, or with `weights` released files, sorted (best mIoU first, least of all else first).

    `output_stride` keeps models that run at it and figures found at it; `data` keeps models trained on it. What a line does
    not have is sorted behind. Raises UsageError for a stride that there is not, UnknownNameError for unknown data.
    """
    if data is not None and data not in CLASS_LISTS:
        known = ", ".join(CLASS_LISTS)
        raise UnknownNameError(f"No data set is called '{data}'; known are {known}.{did_you_mean(data, CLASS_LISTS)}")
    names = list_models(pattern, output_stride=output_stride)
    if weights:
        runs = set(every_name(output_stride))
        lines: Iterable[Listed] = (
            _line(row.full_name, [row], output_stride) for row in list_weights(pattern) if row.name in runs
        )
    else:
        by_name: dict[str, list[WeightRow]] = {}
        for row in released():
            by_name.setdefault(row.name, []).append(row)
        lines = (_line(name, by_name.get(name, []), output_stride) for name in names)
    return sorted((line for line in lines if data in (None, line.model.data)), key=_ORDERS[sort])


def require_some(lines: list[Listed], pattern: str) -> None:
    """Raise UsageError with the nearest names, or a wider pattern, where nothing was found."""
    if lines:
        return
    wider = f" '*{pattern}*' matches more." if not set(pattern) & set("*?[") and list_models(f"*{pattern}*") else ""
    raise UsageError(f"Nothing matches '{pattern}' and the options beside it.{wider or did_you_mean(pattern, every_name())}")


def plain_metric(metric: Metric) -> dict[str, Any]:
    """Return a figure as plain JSON values, without its classes."""
    return {key: value for key, value in vars(metric).items() if key != "per_class"}


def plain_rows(rows: Iterable[WeightRow]) -> list[dict[str, Any]]:
    """Return the rows as the manifest's JSON has them."""
    wanted = {row.full_name for row in rows}
    plain: list[dict[str, Any]] = json.loads((weights_folder() / "manifest.json").read_text(encoding="utf-8"))["rows"]
    return [one for one in plain if f"{one['name']}.{one['tag']}" in wanted]


def _line(name: str, rows: list[WeightRow], output_stride: int | None) -> Listed:
    figures = [
        (metric.value, row.default, index, row, metric)
        for index, row in enumerate(rows)
        for metric in row.metrics
        if metric.name == "mIoU" and output_stride in (None, metric.output_stride)
    ]
    *_, row, metric = max(figures, key=lambda one: one[:3]) if figures else (next((r for r in rows if r.default), None), None)
    if row is None and rows:
        row = rows[0]
    model = parse_name(name)
    strides = encoder_facts(model.encoder).strides
    own = row.config.output_stride if row else min(strides, key=lambda stride: abs(stride - 16), default=None)
    cost = cost_of(row.full_name if row else str(replace(model, data=None, tag=None)))
    return Listed(name, model, row, cost, metric, output_stride or own)


def _last(value: float | None) -> tuple[bool, float]:
    return value is None, value or 0


_ORDERS: Mapping[Sort, Callable[[Listed], Any]] = {
    "name": lambda line: line.name,
    "miou": lambda line: (*_last(-line.metric.value if line.metric else None), line.name),
    "params": lambda line: (*_last(line.params), line.name),
    "flops": lambda line: (*_last(line.flops), line.name),
    "size": lambda line: (*_last(line.bytes), line.name),
}
