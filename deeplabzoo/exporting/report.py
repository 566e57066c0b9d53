"""What an export wrote and what was seen of it, as plain data: `--json` of the command, from which docs/export.md is filled."""

import dataclasses
import importlib.metadata
import json
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deeplabzoo.errors import UsageError, WeightsError
from deeplabzoo.exporting.proof import Check
from deeplabzoo.exporting.wish import Format
from deeplabzoo.inference.onnx_graph import Output
from deeplabzoo.models.strict import read_plain

KIND = "deeplabzoo.export/1"
"""What the first field of a report says, so that other JSON files are not taken for one."""


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """The photos that an int8 file was fitted to."""

    images: int
    list_sha256: str
    """Over their file names, sorted, each followed by a line feed."""


@dataclass(frozen=True, kw_only=True)
class Export:
    """One written file: what it is, the proof that it passed, and its mIoU beside the network's where that was measured."""

    model: str
    weights_sha256: str | None
    """Of the file that the network was read from; None where there was none."""
    format: Format
    precision: str
    """`fp32` or `int8`."""
    output: Output
    size: tuple[int, int] | None
    """(height, width) of the only image it takes; None for open sizes."""
    calibration: Fitted | None
    proof: str
    check: Check | None
    bytes: int
    """Of the file, with its `.bin` where it has one."""
    seconds: float
    """From the first step to the file in its place, checks included."""
    versions: Mapping[str, str]
    cpu: str
    threads: int
    date: str
    """ISO 8601, UTC."""
    command: str | None = None

    def to_json(self) -> str:
        """Return the report as indented JSON."""
        return json.dumps({"kind": KIND, **dataclasses.asdict(self)}, indent=2, allow_nan=False, ensure_ascii=False) + "\n"


def read_export(path: Path) -> Export:
    """Return the report that a file holds; raises UsageError for what is none."""
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if values.pop("kind") != KIND:
            raise ValueError(f"its kind is not {KIND}")
        return read_plain(Export, values, path.name)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, WeightsError) as error:
        raise UsageError(f"'{path}' is not a report of `python -m deeplabzoo.export --json`: {error}.") from None


def versions() -> dict[str, str]:
    """Return the releases of what took part in an export, as far as they are installed."""
    found = {"python": platform.python_version()}
    for name in ("deeplabzoo", "torch", "timm", "onnx", "onnxruntime", "openvino", "nncf"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
