"""The recorded exports as a table: mIoU of each written file beside that of its network; every number comes from a report."""

from collections.abc import Sequence
from pathlib import Path

from deeplabzoo.export.exporter import Export, read_export

BLOCK = "exports-table"
FOLDER = "exports"
"""Their reports lie in this folder below the records."""
_HEADER = ("model", "pictures", "file", "mIoU of the network", "of the file", "difference", "MB")
_RUNTIMES = {"onnx": "onnxruntime", "openvino": "openvino", "torch-export": "torch"}


def exports_table(folder: Path) -> str:
    """Return the table of all reports that measured, by model; raises UsageError for a JSON file that is no report."""
    exports = [read_export(path) for path in sorted(folder.glob("*.json"))]
    measured = sorted((one for one in exports if one.check), key=lambda one: (one.model, one.precision, one.format))
    if not measured:
        return "No run is recorded yet."
    lines = [_line(_HEADER), _line(["---"] * len(_HEADER)), *(_line(_cells(one)) for one in measured)]
    again = [f"- `{one.command}`" for one in measured]
    return "\n".join([*lines, "", _conditions(measured), "", "Again:", "", *again])


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
    photos = {one.calibration.images for one in exports if one.calibration}
    fitted = f" int8 is fitted to {' or '.join(map(str, sorted(photos)))} training photos." if photos else ""
    torches = {f"torch {one.versions['torch']}" for one in exports}
    dates = sorted({one.date[:10] for one in exports})
    made = " to ".join(dict.fromkeys((dates[0], dates[-1])))
    return f"{', '.join(sorted({one.cpu for one in exports}))}; {', '.join(sorted(torches | runtimes))}; {made}.{fitted}"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
