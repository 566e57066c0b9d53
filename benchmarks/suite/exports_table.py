"""The recorded exports as a table: mIoU of each exported file and of its model; every number comes from a report."""

from collections.abc import Sequence
from pathlib import Path

from deeplabzoo.export.exporter import Export, read_export

BLOCK = "exports-table"
FOLDER = "exports"
"""Folder of their reports below the records."""
_HEADER = ("model", "images", "file", "mIoU of the model", "mIoU of the file", "difference", "MB")
_RUNTIMES = {"onnx": "onnxruntime", "openvino": "openvino", "torch-export": "torch"}


def exports_table(folder: Path) -> str:
    """Return the table of all reports with an mIoU, by model; raises UsageError for a JSON file that is not a report."""
    exports = [read_export(path) for path in sorted(folder.glob("*.json"))]
    measured = sorted((one for one in exports if one.check), key=lambda one: (one.model, one.precision, one.format))
    if not measured:
        return "No run is recorded yet."
    lines = [_line(_HEADER), _line(["---"] * len(_HEADER)), *(_line(_cells(one)) for one in measured)]
    commands = [f"- `{one.command}`" for one in measured]
    return "\n".join([*lines, "", _conditions(measured), "", "Reproduce:", "", *commands])


def _cells(export: Export) -> Sequence[str]:
    check = export.check
    assert check is not None
    difference = check.miou_exported - check.miou_original
    return (
        f"`{export.model}`",
        f"{check.data} {check.split}, {check.images}",
        f"{export.format} {export.precision}",
        f"{check.miou_original:.2f} %",
        f"{check.miou_exported:.2f} %",
        f"{difference:+.2f}",
        f"{export.bytes / 1e6:.1f}",
    )


def _conditions(exports: Sequence[Export]) -> str:
    runtimes = {f"{_RUNTIMES[one.format]} {one.versions[_RUNTIMES[one.format]]}" for one in exports}
    images = {one.calibration.images for one in exports if one.calibration}
    calibrated = f" int8 is calibrated on {' or '.join(map(str, sorted(images)))} training images." if images else ""
    torches = {f"torch {one.versions['torch']}" for one in exports}
    dates = sorted({one.date[:10] for one in exports})
    made = " to ".join(dict.fromkeys((dates[0], dates[-1])))
    return f"{', '.join(sorted({one.cpu for one in exports}))}; {', '.join(sorted(torches | runtimes))}; {made}.{calibrated}"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
