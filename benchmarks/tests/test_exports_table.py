"""The table of exported files: what stands in it was recorded by the export command."""

from pathlib import Path

import pytest

from benchmarks.suite.exports_table import exports_table
from deeplabzoo.errors import UsageError
from deeplabzoo.export.exporter import CalibrationSet, Export, read_export
from deeplabzoo.export.parity import AccuracyCheck


def made_export(**fields: object) -> Export:
    """A report of made figures."""
    given: dict[str, object] = {
        "model": "deeplabv3_colors.known",
        "weights_sha256": None,
        "format": "openvino",
        "precision": "int8",
        "output": "logits",
        "size": None,
        "calibration": CalibrationSet(images=48, list_sha256="0" * 64),
        "proof": "int8, 98.000 % of labels equal on 3 photos",
        "check": AccuracyCheck("voc", "val", 50, 70.004, 69.5),
        "bytes": 4_040_000,
        "seconds": 1.0,
        "versions": {"torch": "2.15.0", "openvino": "2026.4"},
        "cpu": "A CPU",
        "threads": 2,
        "date": "2026-01-01T00:00:00+00:00",
        "command": "python -m deeplabzoo.export colors",
    }
    return Export(**{**given, **fields})  # type: ignore[arg-type]


def test_a_measured_export_is_a_row(tmp_path: Path) -> None:
    """MIoU of network and file, their difference, the size, the versions, and the command; what was not measured is no row."""
    (tmp_path / "a.json").write_text(made_export().to_json())
    (tmp_path / "b.json").write_text(made_export(model="unmeasured", check=None).to_json())
    table = exports_table(tmp_path)
    assert "| `deeplabv3_colors.known` | voc val, 50 | openvino int8 | 70.00 % | 69.50 % | -0.50 | 4.0 |" in table
    assert "A CPU; openvino 2026.4, torch 2.15.0; 2026-01-01. int8 is calibrated on 48 training images." in table
    assert "- `python -m deeplabzoo.export colors`" in table
    assert "unmeasured" not in table
    assert exports_table(tmp_path / "none") == "No run is recorded yet."


def test_a_report_is_read_as_it_was_written(tmp_path: Path) -> None:
    """Sizes, checks and photos come back as what they were."""
    report = made_export(size=(257, 129))
    (tmp_path / "a.json").write_text(report.to_json())
    assert read_export(tmp_path / "a.json") == report


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"kind": "deeplabzoo.benchmark/1"}', '{"kind": "deeplabzoo.export/1"}'])
def test_another_file_is_a_sentence(tmp_path: Path, text: str) -> None:
    """A table must not be made of something else."""
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(UsageError, match=r"is not a report of `python -m deeplabzoo\.export --json`"):
        exports_table(tmp_path)
