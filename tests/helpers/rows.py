"""Manifest rows for tests."""

from dataclasses import replace
from typing import Any

from deeplabzoo.hub.manifest import WeightRow, released


def row(**changes: Any) -> WeightRow:
    """The Coral row with some fields changed."""
    coral = next(one for one in released() if one.full_name == "deeplabv3_mobilenetv2_voc.coral")
    return replace(coral, **changes)
