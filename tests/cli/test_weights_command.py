"""`python -m deeplabzoo.weights`: the rows are listed, measured figures enter them, and tables come out of them."""

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from deeplabzoo.cli import weights
from deeplabzoo.errors import UsageError
from deeplabzoo.hub import manifest as manifest_module
from deeplabzoo.hub.manifest import read_manifest, released
from deeplabzoo.publish.manifest_row import add_report, manifest_json
from tools.docs import tables
from tools.docs.tables import BEGIN, END, fill_tables, markdown_table

FOLDER = manifest_module.weights_folder()
TEXT = (FOLDER / "manifest.json").read_text()
CORAL = json.loads(TEXT)["rows"][0]


def report(**changes: Any) -> dict[str, Any]:
    """What `evaluate --json` writes for the Coral weights, as far as `add_report` reads it."""
    return {
        "model": "deeplabv3_mobilenetv2_voc",
        "weights": {"sha256": CORAL["sha256"], "tag": "coral", "source": "https://somewhere", "tensors_sha256": "0" * 64},
        "data": "voc",
        "split": "val",
        "images": 173,
        "limit": None,
        "subset": "173-image subset of 1449",
        "image_list_sha256": "1" * 64,
        "protocol": "single scale, no flip, output stride 16, mean over classes with union > 0",
        "protocol_settings": {"scales": [1.0], "flip": False, "output_stride": 16},
        "miou": 0.723456,
        "pixel_accuracy": 0.934,
        "hardware": {"device": "cpu", "cpu": "Some CPU"},
        "date": "2026-11-21T10:00:00+00:00",
        "command": "python -m deeplabzoo.evaluate deeplabv3_mobilenetv2_voc --data voc --root '/my data' --json /tmp/r.json",
        **changes,
    }


def recorded(*reports: dict[str, Any]) -> list[dict[str, Any]]:
    """The Coral row's metrics after recording, without what stood there before."""
    plain = json.loads(TEXT)
    plain["rows"][0] |= {"metrics": [], "verified": "layout only"}
    text = json.dumps(plain)
    for one in reports:
        text, _ = add_report(text, one)
    metrics: list[dict[str, Any]] = json.loads(text)["rows"][0]["metrics"]
    return metrics


@pytest.fixture
def own_manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the manifest that the command may write."""
    path = tmp_path / "manifest.json"
    path.write_text(TEXT)
    monkeypatch.setattr(manifest_module, "weights_folder", lambda: tmp_path)
    return path


def test_a_measured_metric_enters_the_row_with_its_conditions() -> None:
    """The row then says how it was measured, and the result still satisfies schema and types."""
    text, line = add_report(TEXT, report())
    plain = json.loads(text)
    jsonschema.validate(plain, json.loads((FOLDER / "manifest.schema.json").read_text()))
    miou = next(one for one in plain["rows"][0]["metrics"] if one["value"] == 72.35)
    assert (miou["value"], miou["unit"], miou["origin"]) == (72.35, "%", "measured")
    assert (miou["data"], miou["split"], miou["output_stride"], miou["scales"]) == ("voc", "val", 16, [1.0])
    assert (miou["date"], miou["hardware"]) == ("2026-11-21", "Some CPU")
    assert plain["rows"][0]["verified"] == "measured here"
    assert (
        line
        == "deeplabv3_mobilenetv2_voc.coral: mIoU 72.35 %, pixel accuracy 93.4 % on voc val (173-image subset of 1449) recorded"
    )


def test_the_command_is_kept_without_paths_of_one_machine() -> None:
    (miou, _) = recorded(report())
    assert miou["command"] == "python -m deeplabzoo.evaluate deeplabv3_mobilenetv2_voc --data voc --root DIR"


def test_the_same_conditions_replace_and_other_conditions_add() -> None:
    """Measuring again corrects the figure; another split, stride or flip is another figure."""
    assert [one["value"] for one in recorded(report(), report(miou=0.7))] == [70.0, 93.4]
    flipped = report(protocol_settings={"scales": [1.0], "flip": True, "output_stride": 16})
    assert len(recorded(report(), flipped)) == 4


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"weights": {"sha256": "0" * 64, "tag": "coral"}}, "is of a file with sha256 000000000000.*released is 350af47fd346"),
        ({"weights": {"sha256": "0" * 64, "tag": None}}, "No released weights have the sha256"),
        ({"weights": {"sha256": None, "tag": "coral"}}, "does not name the evaluated file"),
        ({"weights": {"sha256": CORAL["sha256"], "adapted": ["classifier re-initialized"]}}, "adapted model"),
        ({"limit": 10, "subset": "10-image subset of 1449"}, "only part of the split"),
        ({"command": None}, "does not name the command"),
    ],
)
def test_reports_of_something_else_are_refused(changes: dict[str, Any], reason: str) -> None:
    """A figure never stands beside a file that it was not measured on."""
    with pytest.raises(UsageError, match=reason):
        add_report(TEXT, report(**changes))


def test_a_file_that_is_no_report_is_refused(tmp_path: Path, own_manifest: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for content in ("{}", "[]", "not json"):
        (tmp_path / "report.json").write_text(content)
        assert weights.main(["record", str(tmp_path / "report.json")]) == 2
        assert "report" in capsys.readouterr().err
    assert own_manifest.read_text() == TEXT


def test_recording_rewrites_the_manifest_file(tmp_path: Path, own_manifest: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "deeplabzoo")
    (tmp_path / "report.json").write_text(json.dumps(report()))
    assert weights.main(["record", str(tmp_path / "report.json")]) == 0
    assert any(metric.value == 72.35 for metric in read_manifest(own_manifest).rows[0].metrics)
    assert "recorded" in caplog.text


def test_the_manifest_has_one_form() -> None:
    """Recording a figure changes the lines of that figure alone."""
    assert manifest_json(json.loads(TEXT)) == TEXT
    odd = {"text": "brackets [ 1,   2 ] stay", "list": [1, 2], "empty": []}
    assert json.loads(manifest_json(odd)) == odd


def test_listing_prints_rows_or_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert weights.main(["list"]) == 0
    assert capsys.readouterr().out.splitlines() == [str(row) for row in released()]
    assert weights.main(["list", "*.coral", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == [CORAL]
    assert weights.main(["list", "nothing*"]) == 2


@pytest.mark.parametrize("call", [[], ["lst"], ["list", "--jsn"], ["record"], ["table", "--write", "README.md"]])
def test_a_wrong_call_is_one_sentence_and_status_2(call: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert weights.main(call) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1


def test_the_table_is_written_between_its_marks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What stands around the block stays; writing twice changes nothing."""
    document = tmp_path / "README.md"
    document.write_text(f"# Title\n\n{BEGIN}\nold\n{END}\n\nend\n")
    for _ in range(2):
        assert tables.main(["--write", str(document)]) == 0
        assert document.read_text() == f"# Title\n\n{BEGIN}\n{markdown_table(tuple(released()))}\n{END}\n\nend\n"
    assert tables.main([]) == 0
    assert "deeplabv3_mobilenetv2_voc.coral" in capsys.readouterr().out


def test_a_document_may_ask_for_the_measured_rows_alone(tmp_path: Path) -> None:
    """The README shows what was measured here; a hundred published files stand in docs/weights.md."""
    document = tmp_path / "README.md"
    document.write_text("<!-- measured-table:begin --><!-- measured-table:end -->")
    assert tables.main(["--write", str(document)]) == 0
    text = document.read_text()
    for row in released():
        assert (f"`{row.full_name}`" in text) == (row.verified == "measured here")


@pytest.mark.parametrize("text", ["no block", BEGIN, f"{END}{BEGIN}", f"{BEGIN}{END}{BEGIN}{END}"])
def test_a_document_without_one_block_is_left_alone(tmp_path: Path, text: str) -> None:
    """All documents are checked before the first is written."""
    right, wrong = tmp_path / "right.md", tmp_path / "wrong.md"
    right.write_text(f"{BEGIN}{END}")
    wrong.write_text(text)
    assert tables.main(["--write", str(right), str(wrong)]) == 2
    assert right.read_text() == f"{BEGIN}{END}"
    assert wrong.read_text() == text


def test_tables_in_documents_are_what_the_manifest_says() -> None:
    """No number is typed twice: `python -m tools.docs.tables --write` leaves documents unchanged."""
    root = Path(__file__).resolve().parents[2]
    texts = {path: path.read_text() for path in (*root.glob("*.md"), *root.glob("docs/*.md"))}
    documents = [path for path, text in texts.items() if BEGIN in text or "<!-- measured-table:begin -->" in text]
    for document in documents:
        assert fill_tables(document, tuple(released())) == document.read_text(), document.name
    assert {document.name for document in documents} >= {"README.md", "weights.md"}
