"""Model information without torch: `describe`, parameters and FLOPs, and the rows of `deeplabzoo list`."""

import functools
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from deeplabzoo.data.classes import CLASS_LISTS
from deeplabzoo.errors import UnknownNameError, UsageError, did_you_mean
from deeplabzoo.hub.manifest import Metric, WeightRow, released, weights_folder
from deeplabzoo.hub.registry import all_model_names, find_weights, list_models, list_weights
from deeplabzoo.models.config import aspp_rates
from deeplabzoo.models.encoder_table import EncoderInfo, encoder_info
from deeplabzoo.models.names import ModelName, parse_name


@dataclass(frozen=True)
class Description:
    """What is known about one model name; `print()` shows it as a short page."""

    name: str
    architecture: str
    encoder: EncoderInfo
    output_strides: tuple[int, ...]
    """Output strides at which the encoder was measured to run."""
    atrous_rates: dict[int, tuple[int, ...]]
    """ASPP rates at each output stride; a checkpoint may define others."""
    data: str | None
    classes: tuple[str, ...]
    """Class names of `data`; empty for a name without dataset."""
    weights: tuple[WeightRow, ...]

    def __str__(self) -> str:
        strides = [f"{stride} (rates {', '.join(map(str, rates))})" for stride, rates in self.atrous_rates.items()]
        lines = [
            self.name,
            f"  architecture    {self.architecture}",
            f"  encoder         {self.encoder.name}, {self.encoder.params / 1e6:.2f} M parameters, {self.encoder.family}",
            f"  output strides  {'; '.join(strides) or f'none: {self.encoder.refused}'}",
            f"                  {self.encoder.exactness}",
        ]
        if self.data:
            lines.append(f"  classes         {len(self.classes)} of {self.data}: {', '.join(self.classes)}")
        for row in self.weights:
            lines.append(f"  weights         {row}")
            lines += [f"                  {text}" for text in (_licences(row), row.notes) if text]
        if not self.weights:
            lines.append("  weights         none released")
        return "\n".join(lines)


def describe(name: str) -> Description:
    """Return everything known about one model name, or about one of its weights with `name.tag`.

    Raises UnknownNameError on words or tags that do not exist.
    """
    parsed = parse_name(name)
    encoder = encoder_info(parsed.encoder)
    return Description(
        name=str(parsed),
        architecture=parsed.architecture,
        encoder=encoder,
        output_strides=encoder.strides,
        atrous_rates={stride: aspp_rates(stride) for stride in encoder.strides},
        data=parsed.data,
        classes=CLASS_LISTS[parsed.data].classes if parsed.data else (),
        weights=_rows(parsed),
    )


def _rows(name: ModelName) -> tuple[WeightRow, ...]:
    if name.tag:
        return (find_weights(name),)
    return tuple(row for row in released() if row.name == name.untagged)


def _licences(row: WeightRow) -> str:
    return f"code {row.license.code}; weights {row.license.weights}; data {row.license.data}"


# Parameters and FLOPs, from a committed table that `python -m tools.encoders.count_costs` writes.

SIDE = 513
"""Height and width in pixels of the image that FLOPs are counted on: the crop of the papers."""
TABLE = Path(__file__).with_name("cost_table.json")


@dataclass(frozen=True)
class Cost:
    """Parameters of a model, and its floating-point operations by output stride."""

    params: int
    flops: Mapping[int, int]
    """At 513 x 513, batch 1: two per multiply-accumulate, in convolutions and matrix products."""


def get_cost(name: str) -> Cost | None:
    """Return the cost of a model (`architecture_encoder`, 21 classes) or of a released checkpoint (`name.tag`).

    None where the table has no entry: the checkpoint was released after the last count.
    """
    plain = _table().get(name)
    return plain and Cost(plain["params"], {int(stride): flops for stride, flops in plain["flops"].items()})


@functools.cache
def _table() -> Mapping[str, Any]:
    table: Mapping[str, Any] = json.loads(TABLE.read_text(encoding="utf-8"))["networks"]
    return table


# Rows of `deeplabzoo list`: size, FLOPs, best mIoU with its protocol, licence.

Sort = Literal["name", "miou", "params", "flops", "size"]
SORTS: tuple[Sort, ...] = ("name", "miou", "params", "flops", "size")


@dataclass(frozen=True)
class ModelListing:
    """One line of a listing: a model, or one released file of it."""

    name: str
    model: ModelName
    row: WeightRow | None
    """The checkpoint that `create(name, pretrained=True)` loads, or the one that is listed."""
    cost: Cost | None
    metric: Metric | None
    """The best mIoU of `row` at a single scale without flip, else its best one; at the requested output stride, if any."""
    output_stride: int | None
    """Output stride of `flops`: the requested one, else that of the weights, else 16 or the nearest available."""

    @property
    def flops(self) -> int | None:
        """Floating-point operations for an image of 513 x 513."""
        return self.cost.flops.get(self.output_stride) if self.cost and self.output_stride else None

    @property
    def params(self) -> int | None:
        """Parameters of the whole model."""
        return self.cost.params if self.cost else None

    @property
    def bytes(self) -> int | None:
        """Size of the file in bytes; None without a file or where its publisher does not state it."""
        return self.row.bytes if self.row else None

    def to_dict(self) -> dict[str, Any]:
        """Return the line as plain JSON values, named as in the manifest."""
        encoder = encoder_info(self.model.encoder)
        return {
            "name": self.name,
            "architecture": self.model.architecture,
            "encoder": encoder.name,
            "data": self.model.data,
            "weights": self.row.full_name if self.row else None,
            "params": self.params,
            "flops_513": {str(stride): count for stride, count in self.cost.flops.items()} if self.cost else None,
            "output_stride": self.output_stride,
            "output_strides": list(encoder.strides),
            "bytes": self.bytes,
            "miou": metric_to_dict(self.metric) if self.metric else None,
            "license": vars(self.row.license) if self.row else None,
        }


def list_entries(
    pattern: str = "*",
    *,
    output_stride: int | None = None,
    data: str | None = None,
    weights: bool = False,
    sort: Sort = "name",
) -> list[ModelListing]:
    """Return matching models, or released checkpoints, sorted (mIoU in descending order, all else in ascending order).

    Args:
        pattern: Shell pattern of names.
        output_stride: 8, 16 or 32: keep models that run at it, with metrics measured at it.
        data: Keep models trained on this dataset.
        weights: List released checkpoints instead of models.
        sort: Sort key; entries without a value come last.

    Raises:
        UsageError: No such output stride.
        UnknownNameError: Unknown dataset.
    """
    if data is not None and data not in CLASS_LISTS:
        known = ", ".join(CLASS_LISTS)
        raise UnknownNameError(f"Unknown dataset '{data}'; known are {known}.{did_you_mean(data, CLASS_LISTS)}")
    names = list_models(pattern, output_stride=output_stride)
    if weights:
        runs = set(all_model_names(output_stride))
        lines: Iterable[ModelListing] = (
            _line(row.full_name, [row], output_stride) for row in list_weights(pattern) if row.name in runs
        )
    else:
        by_name: dict[str, list[WeightRow]] = {}
        for row in released():
            by_name.setdefault(row.name, []).append(row)
        lines = (_line(name, by_name.get(name, []), output_stride) for name in names)
    return sorted((line for line in lines if data in (None, line.model.data)), key=_ORDERS[sort])


def require_matches(lines: list[ModelListing], pattern: str) -> None:
    """Raise UsageError with a wider pattern or the nearest names if nothing matches."""
    if lines:
        return
    wider = f" '*{pattern}*' matches more." if not set(pattern) & set("*?[") and list_models(f"*{pattern}*") else ""
    raise UsageError(f"Nothing matches '{pattern}' and the other options.{wider or did_you_mean(pattern, all_model_names())}")


def metric_to_dict(metric: Metric) -> dict[str, Any]:
    """Return a metric as plain JSON values, without the values by class."""
    return {key: value for key, value in vars(metric).items() if key != "per_class"}


def rows_to_dicts(rows: Iterable[WeightRow]) -> list[dict[str, Any]]:
    """Return the rows as in the JSON of the manifest."""
    names = {row.full_name for row in rows}
    plain: list[dict[str, Any]] = json.loads((weights_folder() / "manifest.json").read_text(encoding="utf-8"))["rows"]
    return [one for one in plain if f"{one['name']}.{one['tag']}" in names]


def _line(name: str, rows: list[WeightRow], output_stride: int | None) -> ModelListing:
    row = next((one for one in rows if one.default), rows[0] if rows else None)
    metrics = [
        (len(metric.scales) == 1 and not metric.flip, metric.value, metric)
        for metric in (row.metrics if row else ())
        if metric.name == "mIoU" and output_stride in (None, metric.output_stride)
    ]
    metric = max(metrics, key=lambda one: one[:2])[2] if metrics else None
    model = parse_name(name)
    strides = encoder_info(model.encoder).strides
    own = row.config.output_stride if row else min(strides, key=lambda stride: abs(stride - 16), default=None)
    cost = get_cost(row.full_name if row else str(replace(model, data=None, tag=None)))
    return ModelListing(name, model, row, cost, metric, output_stride or own)


def _none_last(value: float | None) -> tuple[bool, float]:
    return value is None, value or 0


_ORDERS: Mapping[Sort, Callable[[ModelListing], Any]] = {
    "name": lambda line: line.name,
    "miou": lambda line: (*_none_last(-line.metric.value if line.metric else None), line.name),
    "params": lambda line: (*_none_last(line.params), line.name),
    "flops": lambda line: (*_none_last(line.flops), line.name),
    "size": lambda line: (*_none_last(line.bytes), line.name),
}


def metric_conditions(metric: Metric) -> str:
    """Return the evaluation protocol of a metric in a line: origin, date, split, output stride and scales."""
    passes = "single scale" if len(metric.scales) == 1 else f"scales {', '.join(f'{scale:g}' for scale in metric.scales)}"
    stride = f"output stride {metric.output_stride}, " if metric.output_stride else ""
    when = f" {metric.date}" if metric.date else ""
    where = f"{metric.data} {metric.split}, {metric.images_text}"
    return f"{metric.origin}{when}: {where}, {stride}{passes}{', flip' if metric.flip else ''}"
