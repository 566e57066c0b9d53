"""Each published row is held by a test of its own layout: a row that is added without one is named here."""

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import test_detectron2
import test_ml_cvnets
import test_mmseg
import test_segmentron
import test_tensorflow_frozen_graph
import test_torchvision
import test_transformers

from deeplabzoo.hub.manifest import WeightRow, released

LAYOUT_TESTS: dict[str, Callable[..., None]] = {
    "detectron2": test_detectron2.test_manifest_rows_match_their_converter,
    "ml_cvnets": test_ml_cvnets.test_manifest_rows_match_their_converter,
    "mmsegmentation": test_mmseg.test_a_file_of_the_rows_layout_is_complete,
    "segmentron": test_segmentron.test_manifest_rows_match_their_converter,
    "tf_zoo": test_tensorflow_frozen_graph.test_manifest_rows_match_their_converter,
    "torchvision": test_torchvision.test_logits_are_torchvisions,
    "transformers": test_transformers.test_manifest_rows_match_their_converter,
}
"""Origin -> the test that builds a file with the names and shapes of a row's, and converts it."""
REAL_FILES = {"tflite", "deeplabzoo"}
"""Formats whose published files are read by tests: checkpoints/converters/test_tflite.py and hub/test_bundled.py."""


def rows_held_by(test: Callable[..., None]) -> Iterable[str]:
    """The rows, or names of rows, that a parametrised test runs over, marked slow or not."""
    (mark,) = (mark for mark in test.pytestmark if mark.name == "parametrize")  # type: ignore[attr-defined]
    for value in mark.args[1]:
        one: Any = value.values[0] if hasattr(value, "values") else value
        yield one.full_name if isinstance(one, WeightRow) else one


@pytest.mark.parametrize("origin", sorted({str(row.origin) for row in released()} - REAL_FILES))
def test_each_row_has_its_layout_tested(origin: str) -> None:
    """Weights whose tensor names do not fit are found here."""
    held = set(rows_held_by(LAYOUT_TESTS[origin]))
    rows = [row for row in released() if row.origin == origin]
    assert rows
    assert [row.full_name for row in rows if not held & {row.full_name, row.name}] == []


def test_there_are_as_many_rows_as_promised() -> None:
    """At least 60 rows from at least 8 origins (docs/origins.md)."""
    rows = list(released())
    assert len(rows) >= 60
    assert len({row.origin for row in rows}) >= 8
