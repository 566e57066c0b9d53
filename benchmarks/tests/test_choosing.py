"""docs/choosing.md, docs/gallery.md and docs/output_stride.md are written by commands, from records and bundled models."""

import re
from pathlib import Path

import pytest

from benchmarks.suite.choosing import Choice, block, choices, datasets_with_chart, main, pareto_front
from benchmarks.suite.recorded_times import Time, Times, recorded_times
from deeplabzoo.benchmark.record import Record, Row, Spread
from deeplabzoo.hub.manifest import BundledSource
from deeplabzoo.hub.registry import list_weights
from tools.docs import gallery, stride_images

ROOT = Path(__file__).resolve().parents[2]


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


def record(date: str, ms: float, threads: int = 2) -> Record:
    """A record of one network's time, as the benchmark command writes it."""
    name, side, one = "deeplabv3plus_mobilenetv2_voc", "torch fp32", Spread(1, 1, 1)
    photo = (513, 513)
    rows = (
        Row(name=name, task="image -> labels", side=side, threads=threads, size=photo, ms=Spread(ms, ms, ms)),
        Row(name=name, task="image -> labels", side=side, threads=threads, size=(64, 64), ms=one),
        Row(name=name, task="image -> labels", side="openvino int8", threads=threads, size=photo, ms=one),
        Row(name=name, task="image -> logits", side=side, threads=threads, size=photo, ms=one),
        Row(name="smp:deeplabv3plus_resnet50", task="image -> labels", side=side, threads=threads, size=photo, ms=one),
    )
    return Record(
        rows=rows,
        command="",
        precision="fp32",
        layout="channels_last",
        threads=threads,
        seed=0,
        versions={"torch": "2.15.0"},
        hardware={"cpu": "a processor"},
        settings={},
        date=date,
        commit=None,
    )


def test_a_dearer_file_must_be_better_to_be_listed() -> None:
    """The table holds no file that a cheaper one equals; a figure on a subset does not compete with whole splits."""
    found = [choice("a", 70, 5), choice("b", 69, 6), choice("c", 75, 9), choice("d", 75, 20), choice("e", 99, 7, subset=True)]
    assert [one.name for one in pareto_front(found)] == ["a", "c"]


def test_the_page_shows_what_is_recorded() -> None:
    """Written by the command and not by hand; a change of manifest, costs or records asks for a new run of it."""
    text = (ROOT / "docs" / "choosing.md").read_text()
    written = text.partition("<!-- choosing:begin -->\n")[2].partition("\n<!-- choosing:end -->")[0]
    assert written == block(choices(), recorded_times(ROOT / "benchmarks")), "run python -m benchmarks.suite.choosing"
    pictures = re.findall(r"\((images/[\w.]+)\)", written)
    assert pictures
    assert [name for name in pictures if not (ROOT / "docs" / name).is_file()] == []


def test_every_metric_is_of_the_manifest() -> None:
    """No number is made up: each choice is a single-scale figure of a row, at a stride whose arithmetic was counted."""
    of_rows = {(row.full_name, metric.value) for row in list_weights() for metric in row.metrics}
    found = choices()
    assert {(one.name, one.miou) for one in found} <= of_rows
    assert set(datasets_with_chart(found)) >= {"voc", "cityscapes", "ade20k"}


def test_times_of_one_machine_are_drawn(tmp_path: Path) -> None:
    """The newest record says which; its fastest time in float32 counts; one of other threads is left out."""
    assert recorded_times(tmp_path) is None
    (tmp_path / "other.json").write_text("{}")
    record("2026-01-01T00:00:00+00:00", 10).write(tmp_path / "slower.json")
    record("2026-02-01T00:00:00+00:00", 8).write(tmp_path / "new.json")
    record("2026-01-15T00:00:00+00:00", 1, threads=64).write(tmp_path / "elsewhere.json")
    found = recorded_times(tmp_path)
    assert found is not None
    assert found.by_file == {"deeplabv3plus_mobilenetv2_voc.v1": Time(8, "torch fp32")}
    assert found.machine == "a processor, 2 threads, torch 2.15.0"


def test_without_times_there_is_no_chart_of_times() -> None:
    assert "No chart of times" in block(choices(), None)
    assert "No chart of times" in block(choices(), Times({}, "a machine"))
    page = block(choices(), Times({one.name: Time(1.0, "torch fp32") for one in choices()}, "a machine"))
    assert "choosing_voc_time.png" in page


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
def test_charts_are_what_the_commands_write(tmp_path: Path) -> None:
    """The page of the gallery and the table of strides, written anew from the bundled weights."""
    assert gallery.main(["--photos", str(ROOT / "docs" / "images"), "--out", str(tmp_path / "gallery.md")]) == 0
    assert (tmp_path / "gallery.md").read_text() == (ROOT / "docs" / "gallery.md").read_text()
    document = tmp_path / "output_stride.md"
    document.write_text("<!-- stride-table:begin -->\n<!-- stride-table:end -->\n")
    photo = ROOT / "docs" / "images" / "cat.jpg"
    assert stride_images.main(["--photo", str(photo), "--write", str(document)]) == 0
    assert document.read_text().strip() in (ROOT / "docs" / "output_stride.md").read_text()
    assert {path.name for path in (tmp_path / "images").iterdir()} == {f"stride_{stride}.jpg" for stride in (8, 16, 32)}
