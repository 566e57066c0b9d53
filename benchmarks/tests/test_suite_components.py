"""The benchmarks of labels and of the confusion matrix alone: rows that compare equal answers, on files of the caller."""

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.color_net import ColorNet
from PIL import Image

from benchmarks.suite import confusion_matrix, upsample_argmax
from deeplabzoo.benchmark import timing


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
