"""docs/choosing.md, docs/gallery.md and docs/output_stride.md are written by commands, from records and bundled models."""

import re
from pathlib import Path

import pytest

from deeplabzoo.benchmarking.choosing import Choice, block, charted, choices, efficient, main, times
from deeplabzoo.benchmarking.record import Record, Row, Spread
from deeplabzoo.publishing import gallery, stride_pictures
from deeplabzoo.zoo.manifest import BundledSource
from deeplabzoo.zoo.registry import list_weights

ROOT = Path(__file__).resolve().parents[1]


def choice(name: str, miou: float, gflops: float, *, subset: bool = False) -> Choice:
    return Choice(
        name=name,
        architecture="deeplabv3",
        data="voc",
        miou=miou,
        measured=False,
        subset=subset,
        output_stride=16,
        gflops=gflops,
    )


def record(date: str, ms: float) -> Record:
    """A record of one network's time, as the benchmark command writes it."""
    spread = Spread(ms, ms, ms)
    rows = (
        Row(name="deeplabv3plus_mobilenetv2_voc", task="image -> labels", side="torch fp32", threads=2, ms=spread),
        Row(name="deeplabv3plus_mobilenetv2_voc", task="image -> logits", side="torch fp32", threads=2, ms=Spread(1, 1, 1)),
        Row(name="smp:deeplabv3plus_resnet50", task="image -> labels", side="torch fp32", threads=2, ms=Spread(2, 2, 2)),
    )
    return Record(
        rows=rows,
        command="",
        precision="fp32",
        layout="channels_last",
        threads=2,
        seed=0,
        versions={},
        hardware={"cpu": "a processor"},
        settings={},
        date=date,
        commit=None,
    )


def test_a_dearer_file_must_be_better_to_be_listed() -> None:
    """The table holds no file that a cheaper one equals; a figure on a subset does not compete with whole splits."""
    found = [choice("a", 70, 5), choice("b", 69, 6), choice("c", 75, 9), choice("d", 75, 20), choice("e", 99, 7, subset=True)]
    assert [one.name for one in efficient(found)] == ["a", "c"]


def test_the_page_shows_what_is_recorded() -> None:
    """Written by the command and not by hand; a change of manifest, costs or records asks for a new run of it."""
    text = (ROOT / "docs" / "choosing.md").read_text()
    written = text.partition("<!-- choosing:begin -->\n")[2].partition("\n<!-- choosing:end -->")[0]
    assert written == block(choices(), times(ROOT / "benchmarks")), "run python -m deeplabzoo.benchmarking.choosing"
    pictures = re.findall(r"\((images/[\w.]+)\)", written)
    assert pictures
    assert [name for name in pictures if not (ROOT / "docs" / name).is_file()] == []


def test_every_figure_is_of_the_manifest() -> None:
    """No number is made up: each choice is a single-scale figure of a row, at a stride whose arithmetic was counted."""
    of_rows = {(row.full_name, metric.value) for row in list_weights() for metric in row.metrics}
    found = choices()
    assert {(one.name, one.miou) for one in found} <= of_rows
    assert set(charted(found)) >= {"voc", "cityscapes", "ade20k"}


def test_times_come_from_the_newest_record_alone(tmp_path: Path) -> None:
    """Times of two machines or days are never drawn as if they were one's; a JSON of another kind is passed over."""
    assert times(tmp_path) == {}
    (tmp_path / "other.json").write_text("{}")
    record("2026-01-01T00:00:00+00:00", 10).write(tmp_path / "old.json")
    record("2026-02-01T00:00:00+00:00", 20).write(tmp_path / "new.json")
    assert times(tmp_path) == {("deeplabv3plus_mobilenetv2_voc.v1", 16): 20}


def test_without_times_there_is_no_chart_of_times() -> None:
    assert "No chart of times" in block(choices(), {})
    timed = {(one.name, one.output_stride): 1.0 for one in choices()}
    assert "choosing_voc_time.png" in block(choices(), timed)


def test_the_command_draws_its_charts(tmp_path: Path) -> None:
    document = tmp_path / "choosing.md"
    document.write_text("before\n<!-- choosing:begin -->\n<!-- choosing:end -->\nafter\n")
    assert main(["--write", str(document), "--records", str(tmp_path)]) == 0
    assert document.read_text().startswith("before\n<!-- choosing:begin -->\n### ")
    assert (tmp_path / "images" / "choosing_voc.png").read_bytes().startswith(b"\x89PNG")


def test_the_gallery_shows_every_bundled_model() -> None:
    """A release that is bundled appears in the gallery, with pictures that are there."""
    text = (ROOT / "docs" / "gallery.md").read_text()
    bundled = [row.full_name for row in list_weights() if isinstance(row.source, BundledSource)]
    assert bundled
    assert re.findall(r"^## (.+)$", text, flags=re.MULTILINE) == bundled
    pictures = re.findall(r"\]\(((?:gallery|images)/[^)]+\.(?:png|jpg))\)", text)
    assert len(pictures) >= 3 * len(bundled)
    assert [name for name in pictures if not (ROOT / "docs" / name).is_file()] == []


@pytest.mark.slow
def test_pictures_are_what_the_commands_write(tmp_path: Path) -> None:
    """The page of the gallery and the table of strides, written anew from the bundled weights."""
    assert gallery.main(["--photos", str(ROOT / "docs" / "images"), "--out", str(tmp_path / "gallery.md")]) == 0
    assert (tmp_path / "gallery.md").read_text() == (ROOT / "docs" / "gallery.md").read_text()
    document = tmp_path / "output_stride.md"
    document.write_text("<!-- stride-table:begin -->\n<!-- stride-table:end -->\n")
    photo = ROOT / "docs" / "images" / "cat.jpg"
    assert stride_pictures.main(["--photo", str(photo), "--write", str(document)]) == 0
    assert document.read_text().strip() in (ROOT / "docs" / "output_stride.md").read_text()
    assert {path.name for path in (tmp_path / "images").iterdir()} == {f"stride_{stride}.jpg" for stride in (8, 16, 32)}
