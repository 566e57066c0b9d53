"""The report of an evaluation: scores, protocol, weights, dataset and hardware, so that it can be reproduced and compared."""

import dataclasses
import hashlib
import json
import math
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import deeplabzoo
from deeplabzoo.evaluation.metrics import Scores

MIOU_DEFINITION = (
    "mean IoU over the classes whose union is not empty, from one int64 confusion matrix over all pictures "
    "at the labels' own resolution; absent classes are left out and listed"
)


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """Settings that change a score; two reports are comparable where these, the dataset and the image list are equal."""

    scales: tuple[float, ...]
    flip: bool
    output_stride: int
    resize: str
    size: tuple[int, int]
    """Nominal model input (height, width) in pixels that `resize` and `pad` refer to."""
    pad: bool
    ignore_index: int
    tiles: str | None = None
    """How images were cut into tiles, None where none was."""
    label_resolution: str = "original"
    miou: str = MIOU_DEFINITION

    def __str__(self) -> str:
        scales = ", ".join(f"{scale:g}" for scale in self.scales)
        passes = f"scales {scales}" if len(self.scales) > 1 else "single scale" + (f" {scales}" if scales != "1" else "")
        resize = "image at its own size" if self.resize == "none" else f"{self.resize} side to {self.size[0]} x {self.size[1]}"
        return (
            f"{passes}, {'flip' if self.flip else 'no flip'}, output stride {self.output_stride}, "
            f"{resize}{', padded' if self.pad else ''}{f', {self.tiles}' if self.tiles else ''}, "
            "logits upsampled to the labels' own resolution, "
            f"label {self.ignore_index} ignored, mean over classes with union > 0"
        )


@dataclass(frozen=True, kw_only=True)
class Report:
    """The scores (0...1) of one model on one split, and everything needed to measure them again."""

    model: str
    weights: Mapping[str, Any]
    """Origin of the weights (`name`, `tag`, `source`, `sha256` of the file; None where there was no file), and `tensors_sha256`
    of the model's tensors."""
    data: str
    split: str
    images: int
    """Number of images evaluated."""
    limit: int | None
    """Value of `limit` where it excluded images."""
    subset: str | None
    """A note where fewer images were evaluated than the split, or its publisher's list, has."""
    image_list_sha256: str
    """SHA-256 over the evaluated images' names, sorted, each followed by a line feed."""
    protocol: Protocol
    classes: tuple[str, ...]
    scores: Scores
    confusion_matrix: tuple[tuple[int, ...], ...]
    """Pixels; rows are true classes, columns predicted ones."""
    versions: Mapping[str, str]
    hardware: Mapping[str, Any]
    date: str
    """ISO 8601, UTC, when the evaluation ended."""
    seconds: float
    command: str | None = None

    @property
    def miou(self) -> float:
        """Mean IoU, 0...1."""
        return self.scores.miou

    @property
    def pixel_accuracy(self) -> float:
        """Fraction of the scored pixels whose label is correct."""
        return self.scores.pixel_accuracy

    @property
    def mean_accuracy(self) -> float:
        """Mean recall over the classes in the ground truth."""
        return self.scores.mean_accuracy

    @property
    def frequency_weighted_iou(self) -> float:
        """IoU weighted by the classes' shares of the true pixels."""
        return self.scores.frequency_weighted_iou

    @property
    def dice(self) -> float:
        """Mean Dice over the same classes as `miou`."""
        return self.scores.dice

    @property
    def per_class(self) -> dict[str, float | None]:
        """IoU by class name; None where the class is absent."""
        return dict(zip(self.classes, self.scores.per_class_iou, strict=True))

    @property
    def per_class_dice(self) -> dict[str, float | None]:
        """Dice by class name; None where the class is absent."""
        return dict(zip(self.classes, self.scores.per_class_dice, strict=True))

    @property
    def absent_classes(self) -> tuple[str, ...]:
        """Classes without a score: in neither labels nor predictions, or ignored; `miou` is a mean over the others."""
        return tuple(self.classes[index] for index in self.scores.absent_classes)

    @property
    def weights_sha256(self) -> str:
        """SHA-256 of the weights file, or of the tensors where the model did not come from a file."""
        return str(self.weights.get("sha256") or self.weights["tensors_sha256"])

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain JSON values, as `--json` writes them; scores are in 0...1."""
        return {
            "model": self.model,
            "weights": dict(self.weights),
            "data": self.data,
            "split": self.split,
            "images": self.images,
            "limit": self.limit,
            "subset": self.subset,
            "image_list_sha256": self.image_list_sha256,
            "protocol": str(self.protocol),
            "protocol_settings": dataclasses.asdict(self.protocol),
            "miou": self.miou,
            "pixel_accuracy": self.pixel_accuracy,
            "mean_accuracy": self.mean_accuracy,
            "frequency_weighted_iou": self.frequency_weighted_iou,
            "dice": self.dice,
            "per_class": self.per_class,
            "per_class_dice": self.per_class_dice,
            "absent_classes": list(self.absent_classes),
            "classes": list(self.classes),
            "confusion_matrix": [list(row) for row in self.confusion_matrix],
            "versions": dict(self.versions),
            "hardware": dict(self.hardware),
            "date": self.date,
            "seconds": self.seconds,
            "command": self.command,
        }

    def to_json(self) -> str:
        """Return `to_dict()` as indented JSON with one line per row of the matrix."""
        values = self.to_dict()
        rows = ",\n    ".join(json.dumps(row) for row in values.pop("confusion_matrix"))
        head = json.dumps(values, indent=2, allow_nan=False, ensure_ascii=False).removesuffix("\n}")
        return f'{head},\n  "confusion_matrix": [\n    {rows}\n  ]\n}}\n'

    def table(self) -> str:
        """Return the report as text: one line per class (`true %`: its share of the true pixels), then the means."""
        pixels = [sum(row) for row in self.confusion_matrix]
        total = sum(pixels)
        width = max(len("class"), *map(len, self.classes))
        lines = [f"{'class':<{width}}   IoU %  Dice %  true %"]
        for name, iou, dice, count in zip(
            self.classes, self.scores.per_class_iou, self.scores.per_class_dice, pixels, strict=True
        ):
            lines.append(f"{name:<{width}}  {_percent(iou)}  {_percent(dice)}  {_percent(count / total)}")
        lines.append(f"{'mean':<{width}}  {_percent(self.miou)}  {_percent(self.dice)}")
        absent = f"absent and left out of the means: {', '.join(self.absent_classes)}" if self.absent_classes else ""
        return "\n".join(
            [
                *lines,
                *filter(None, [absent]),
                "",
                f"{self.model} on {self.data} {self.split}: {self.subset or f'{self.images} images'} in {self.seconds:.1f} s",
                f"mIoU {100 * self.miou:.2f} %, pixel accuracy {100 * self.pixel_accuracy:.2f} %, "
                f"mean accuracy {100 * self.mean_accuracy:.2f} %, "
                f"frequency-weighted IoU {100 * self.frequency_weighted_iou:.2f} %, Dice {100 * self.dice:.2f} %",
                f"protocol: {self.protocol}",
                f"weights:  sha256 {self.weights_sha256}{'' if self.weights.get('sha256') else ' (of the tensors)'}",
            ]
        )


def image_list_sha256(names: Sequence[str]) -> str:
    """Return the SHA-256 of the names, sorted, each followed by a line feed: the same set of images has the same hash."""
    return hashlib.sha256("".join(f"{name}\n" for name in sorted(names)).encode()).hexdigest()


def hardware(device: torch.device) -> dict[str, Any]:
    """Return what the model ran on: processor, thread count of torch, and the GPU where one was used."""
    found: dict[str, Any] = {
        "device": device.type,
        "cpu": _cpu_model(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }
    if device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
    return found


def software_versions() -> dict[str, str]:
    """Return the versions of this package, torch and timm."""
    import timm

    return {"deeplabzoo": deeplabzoo.__version__, "torch": torch.__version__, "timm": timm.__version__}


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def _percent(value: float | None) -> str:
    return f"{'-':>6}" if value is None or math.isnan(value) else f"{100 * value:6.2f}"


METRIC_FIELDS = {"mIoU": "miou", "pixel accuracy": "pixel_accuracy"}
"""Name in the manifest -> field of a report, 0...1."""
