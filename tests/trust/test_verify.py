"""`python -m deeplabzoo.weights verify`: a figure is measured again from its row, and a difference ends in status 1."""

import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file
from trust_record import TrustRecord, write_record

import deeplabzoo
from deeplabzoo.cli import weights
from deeplabzoo.data.dataset import build_dataset
from deeplabzoo.evaluation import reproduce as verify_module
from deeplabzoo.evaluation.report import Report
from deeplabzoo.evaluation.reproduce import TOLERANCE_POINTS, ReproductionResult, verify
from deeplabzoo.hub.manifest import Metric, UrlSource, WeightRow, released, weights_folder

PERSON_CLASSES = ("background", "person")
PERSON = next(row for row in released() if row.full_name == "deeplabv3plus_mobilenetv2_person.v1")
PHOTO = Path(__file__).resolve().parents[2] / "docs" / "images" / "astronaut.jpg"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of data sets; one of them holds two small pictures of a person, with the predicted labels, partly wrong."""
    folder = tmp_path_factory.mktemp("data")
    home = folder / "people" / "val"
    predictor = deeplabzoo.Predictor(deeplabzoo.create(PERSON.full_name, pretrained=True), device="cpu", engine="torch")
    for name, size in (("a", (96, 64)), ("b", (64, 96))):
        photo = Image.open(PHOTO).convert("RGB").resize(size)
        truth = predictor(photo).labels.astype(np.uint8)
        truth[: truth.shape[0] // 4] = 1 - truth[: truth.shape[0] // 4]
        for part, picture in (("images", photo), ("masks", Image.fromarray(truth))):
            (home / part).mkdir(parents=True, exist_ok=True)
            picture.save(home / part / f"{name}.png")
    (folder / "something_else").mkdir()
    return folder


@pytest.fixture(scope="module")
def report(data: Path) -> Report:
    """What the person network scores on them."""
    opened = build_dataset("folder", data / "people", "val", classes=PERSON_CLASSES)
    return deeplabzoo.evaluate(deeplabzoo.create(PERSON.full_name, pretrained=True), opened, device="cpu")


@pytest.fixture(scope="module")
def row(report: Report) -> WeightRow:
    """The person row with the two figures that these pictures give."""
    mine = replace(
        PERSON.metrics[0],
        images=2,
        image_list_sha256=report.image_list_sha256,
        protocol=str(report.protocol),
        per_class=None,
    )
    return replace(
        PERSON,
        metrics=(
            replace(mine, name="mIoU", value=round(100 * report.miou, 2)),
            replace(mine, name="pixel accuracy", value=round(100 * report.pixel_accuracy, 2)),
        ),
    )


@pytest.fixture
def _measured_before(report: Report, monkeypatch: pytest.MonkeyPatch) -> None:
    """Takes the report for a new measurement, where the test is about what is made of it."""
    monkeypatch.setattr(verify_module, "evaluate", lambda *_, **__: report)


def verified(row: WeightRow, folder: Path | None, **options: Any) -> list[ReproductionResult]:
    return list(verify(row, folder, device="cpu", **options))


def with_metrics(row: WeightRow, **changes: Any) -> WeightRow:
    return replace(row, verified="layout only", metrics=tuple(replace(metric, **changes) for metric in row.metrics))


def test_metrics_are_found_again_among_folders(row: WeightRow, data: Path) -> None:
    """Golden logits first, then both figures of one pass; the data set lies in a folder of the folder that is named."""
    findings = verified(row, data)
    assert [finding.status for finding in findings] == ["ok", "ok", "ok"]
    assert findings[0].detail.startswith("golden logits")
    assert [finding.difference for finding in findings[1:]] == [0, 0]
    assert [one.status for one in verified(row, data / "people")] == ["ok", "ok", "ok"]


@pytest.mark.usefixtures("_measured_before")
@pytest.mark.parametrize(("wrong_by", "tolerance", "status"), [(0.1, 0.1, "ok"), (0.11, 0.1, "differs"), (0.11, 0.2, "ok")])
def test_a_metric_that_is_off_by_more_than_the_tolerance_differs(
    row: WeightRow, data: Path, wrong_by: float, tolerance: float, status: str
) -> None:
    """0.1 point is allowed, 0.11 is not."""
    miou = row.metrics[0]
    changed = replace(row, metrics=(replace(miou, value=round(miou.value - wrong_by, 2)),))
    finding = verified(changed, data, tolerance=tolerance)[-1]
    assert (finding.status, finding.difference) == (status, wrong_by)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"images": 3}, "has its 3 images"),
        ({"image_list_sha256": "0" * 64}, "has its 2 images"),
        ({"split": "test"}, "whose split 'test' has its 2 images"),
        ({"data": "mapillary", "images": None, "origin": "published"}, "no reader of 'mapillary' is built in"),
        ({"images": None, "origin": "published"}, "does not state the number of images"),
        ({"output_stride": 32, "scales": ()}, "scales must be numbers above 0"),
    ],
    ids=str,
)
def test_what_cannot_be_measured_is_reported_with_its_reason(
    row: WeightRow, data: Path, changes: dict[str, Any], reason: str
) -> None:
    """Other pictures, too few, no reader: never compared with something else, never passed over."""
    findings = [one for one in verified(with_metrics(row, **changes), data) if not one.detail.startswith("golden")]
    assert [one.status for one in findings] == ["unverified"] * 2
    assert all(reason in str(one) for one in findings)


@pytest.mark.usefixtures("_measured_before")
def test_a_changed_protocol_is_a_difference(row: WeightRow, data: Path) -> None:
    """A figure that only agrees because something else is measured now does not agree; one of another name is not compared."""
    findings = verified(with_metrics(row, protocol="single scale, centre crop"), data)
    assert [one.status for one in findings] == ["ok", "differs", "differs"]
    assert "the protocol is now" in findings[1].detail
    unknown = verified(with_metrics(row, name="boundary IoU"), data)[1]
    assert (unknown.status, unknown.detail.rpartition(": ")[2]) == ("unverified", "no report has a figure of this name")


def test_changed_logits_are_found_before_anything_is_measured(
    row: WeightRow, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One logit of a thousand, moved by a thousandth: seconds, not minutes, until it is known."""
    name = f"{row.full_name}.golden.safetensors"
    shutil.copy(weights_folder() / name, tmp_path / name)
    tensors = load_file(tmp_path / name)
    tensors["logits"].flat[1000] += 0.001 * np.abs(tensors["logits"]).max()
    metadata = {"format": "deeplabzoo golden logits", "input": "97x129", "output_stride": "16"}
    save_file(tensors, tmp_path / name, metadata)
    monkeypatch.setattr(verify_module, "weights_folder", lambda: tmp_path)
    (finding,) = verified(row, data)
    assert (finding.status, round(finding.difference or 0, 4)) == ("differs", 0.001)


def test_weights_that_are_not_here_are_not_fetched_for_nothing(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No download where no figure could be measured; where one could be, its failure is the reason."""
    monkeypatch.setenv("DEEPLABZOO_OFFLINE", "1")
    away = next(one for one in released() if one.full_name == "deeplabv3_mobilenetv2_voc.coral")
    assert isinstance(away.source, UrlSource)
    findings = verified(away, None)
    assert len(findings) == len(away.metrics)
    assert all("its dataset is needed; name the folder" in one.detail for one in findings)
    (finding,) = verified(with_metrics(away, data="folder", images=2, image_list_sha256=None), data)
    assert finding.detail.startswith("the weights cannot be had: deeplabv3_mobilenetv2_voc.coral is not in the cache")


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (
            ["deeplabv3plus_mobilenetv2_person"],
            1,
            "error: 3 checks of 1 released file: 1 reproduced, 0 different, 2 not verifiable here.",
        ),
        (["deeplabv3plus_mobilenetv2_person.v1", "--data", "nowhere"], 1, "1 reproduced, 0 different, 2 not verifiable here."),
        (["deeplabv3plus_mobilenetv2_persn"], 2, "Did you mean 'deeplabv3plus_mobilenetv2_person'"),
        (["deeplabv3plus_mobilenetv2_person", "--tolerance", "-1"], 2, "--tolerance must be a number of points >= 0"),
    ],
    ids=["no data", "no such folder", "unknown name", "no tolerance"],
)
def test_the_command_ends_in_one_sentence_and_a_status(
    words: list[str], status: int, said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """0 only where every statement was verified; what was not is listed with its reason."""
    monkeypatch.delenv("DEEPLABZOO_DATA", raising=False)
    assert weights.main(["verify", "--device", "cpu", *words]) == status
    out, err = capsys.readouterr()
    assert said in err.splitlines()[-1]
    if status == 1:
        assert "ok         deeplabv3plus_mobilenetv2_person.v1: golden logits" in out
        assert out.count("unverified") == 2
        assert out.count("DEEPLABZOO_DATA") == 2


@pytest.mark.usefixtures("_measured_before")
def test_a_difference_is_status_1_and_agreement_status_0(
    row: WeightRow, data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a release script asks for; the folder may come from the environment."""
    monkeypatch.setenv("DEEPLABZOO_DATA", str(data))
    rows = [row]
    monkeypatch.setattr("deeplabzoo.hub.registry.list_weights", lambda _: rows)
    assert weights.main(["verify", row.name, "--device", "cpu"]) == 0
    assert "3 checks of 1 released file: 3 reproduced, 0 different, 0 not verifiable here." in capsys.readouterr().out
    rows[0] = with_metrics(row, value=50.0)
    assert weights.main(["verify", row.name, "--device", "cpu"]) == 1
    assert "1 reproduced, 2 different, 0 not verifiable here." in capsys.readouterr().err


def measured_here() -> list[WeightRow]:
    return [row for row in released() if any(metric.origin == "measured" for metric in row.metrics)]


@pytest.mark.soak
@pytest.mark.timeout(7200)
def test_every_metric_measured_here_is_found_again(shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every figure of ours in the table, of bundled files and of the TensorFlow Lite one: on its own pictures, to 0.1 point."""
    cached = tmp_path / "deeplabv3_mobilenetv2_voc.coral"
    cached.mkdir()
    shutil.copy(shared_data / "tflite" / "deeplabv3_mnv2_pascal_quant.tflite", cached)
    monkeypatch.setenv("DEEPLABZOO_CACHE", str(tmp_path))
    monkeypatch.setenv("DEEPLABZOO_OFFLINE", "1")
    started = time.perf_counter()
    rows = measured_here()
    findings = [finding for row in rows for finding in verify(row, shared_data, device="cpu")]
    figures = [one for one in findings if not one.detail.startswith("golden")]
    write_record(
        TrustRecord(
            name="verify_bundled",
            area="numbers",
            what="Figures of released files measured again from their rows, after their golden logits",
            command="python -m pytest -m soak tests/trust/test_verify.py",
            seconds=round(time.perf_counter() - started, 1),
            inputs=len(findings),
            survived=sum(finding.status == "ok" for finding in findings),
            details={
                "tolerance_points": TOLERANCE_POINTS,
                "largest_difference_points": max(one.difference or 0.0 for one in figures),
                "findings": [str(finding) for finding in findings],
            },
        )
    )
    assert [str(one) for one in findings if one.status != "ok"] == []
    stated: list[Metric] = [metric for row in rows for metric in row.metrics]
    assert len(figures) == len(stated)
