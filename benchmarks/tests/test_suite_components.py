"""The benchmarks of labels and of the confusion matrix alone: rows that compare equal answers, on files of the caller."""

import json
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.color_net import ColorNet
from PIL import Image

from benchmarks.suite import confusion_matrix, upsample_argmax
from benchmarks.suite.__main__ import build_parser
from deeplabzoo.benchmark import timing
from deeplabzoo.benchmark.record import reproduce_command
from deeplabzoo.cli.parser import get_parser

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def short_timings(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is promised here is what is compared, not a time."""
    monkeypatch.setattr(timing, "_MIN_TIMING_S", 0.0)
    monkeypatch.setattr(timing, "_SETTLE_S", 0.0)


def test_label_rows_compare_equal_labels_in_both_layouts(tmp_path: Path) -> None:
    """One row for each memory layout of torch's logits; nearly every pixel alike; the boundary share is of these photos."""
    picture = np.zeros((80, 100, 3), np.uint8)
    picture[:40, :50] = (255, 0, 0)
    Image.fromarray(picture).save(tmp_path / "photo.png")
    logits = upsample_argmax.head_logits(ColorNet(), [tmp_path / "photo.png"] * 2, (64, 128))
    assert len(logits) == 2
    rows = upsample_argmax.label_rows(logits, (64, 128), align_corners=False, name="small", pairs=2)
    assert [row.peer for row in rows] == [f"torch interpolate + argmax, {layout} logits" for layout in upsample_argmax.LAYOUTS]
    for row in rows:
        assert row.agreement is not None
        assert row.agreement > 0.999
        assert 0 < row.figures["boundary_fraction"] < 0.5
        assert row.pairs == 2
        assert row.side == "deeplabzoo, compiled cells"


def test_boundary_share_counts_cells_with_two_winners() -> None:
    """A vertical edge through a map of 3 x 3 places crosses one of two columns of cells."""
    low = torch.zeros(1, 2, 3, 3)
    low[:, 1, :, 2] = 1
    assert upsample_argmax.boundary_fraction([low]) == 0.5


def test_confusion_rows_compare_equal_counts(tmp_path: Path) -> None:
    """Both count the same pixels; foreign numbers of a mask are void."""
    mask = np.zeros((20, 30), np.uint8)
    mask[5:, 10:], mask[0, 0], mask[1] = 3, 200, 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    labels = confusion_matrix.label_pairs([tmp_path / "mask.png"], (40, 60))
    predicted, true = labels[0]
    assert predicted.shape == true.shape == (40, 60)
    assert set(np.unique(true)) == {0, 3, 255}
    assert set(np.unique(predicted)) == {0, 3}
    rows = confusion_matrix.confusion_rows(labels, pairs=2)
    assert [row.agreement for row in rows] == [1.0, 1.0]
    assert [row.peer for row in rows] == [
        "torchmetrics JaccardIndex.update, default",
        "torchmetrics JaccardIndex.update, validate_args=False",
    ]


def test_recorded_commands_are_valid_calls() -> None:
    """Whoever copies the command under a table runs it: today's parsers accept every recorded one."""
    records = [*(ROOT / "benchmarks").glob("*.json"), *(ROOT / "benchmarks").glob("[elt]*/*.json")]
    commands = [json.loads(path.read_text(encoding="utf-8")).get("command") or "" for path in records]
    found = set()
    for command in commands:
        words = shlex.split(command)
        if words[:2] != ["python", "-m"]:
            continue
        module, arguments = words[2], words[3:]
        if module == "benchmarks.suite":
            build_parser().parse_args(arguments)
        elif module in ("deeplabzoo.benchmark", "deeplabzoo.export", "deeplabzoo.evaluate"):
            train = [word for word in arguments if word == "--train"]
            get_parser(module.removeprefix("deeplabzoo."), *train).parse_args([one for one in arguments if one != "--train"])
        found.add(module)
    assert {"benchmarks.suite", "deeplabzoo.benchmark", "deeplabzoo.export", "deeplabzoo.evaluate"} <= found


def test_a_recorded_command_names_no_folder_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """The dataset folder is written as the variable that names it."""
    monkeypatch.setenv("DEEPLABZOO_DATA", "/home/me/data")
    command = reproduce_command("benchmarks.suite", ["confusion", "--masks", "/home/me/data/a.png"])
    assert command == "python -m benchmarks.suite confusion --masks $DEEPLABZOO_DATA/a.png"
