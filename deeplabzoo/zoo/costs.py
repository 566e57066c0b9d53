"""What a network costs, read from a committed table: parameters, and arithmetic on a photo of 513 x 513; no torch is needed.

The table is counted on shapes by `python -m deeplabzoo.zoo.count_costs`.
"""

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SIDE = 513
"""Height and width in pixels of the photo that arithmetic is counted on, the papers' crop."""
TABLE = Path(__file__).with_name("cost_table.json")


@dataclass(frozen=True)
class Cost:
    """Parameters of a network, and its floating-point operations by output stride."""

    params: int
    flops: Mapping[int, int]
    """At 513 x 513, batch 1: two for each multiplication with its addition, in convolutions and matrix products."""


def cost_of(name: str) -> Cost | None:
    """Return the cost of a network (`architecture_encoder`, with 21 classes) or of a released file (`name.tag`).

    None where the table does not have it: it was released after the last count.
    """
    plain = _table().get(name)
    return plain and Cost(plain["params"], {int(stride): flops for stride, flops in plain["flops"].items()})


@functools.cache
def _table() -> Mapping[str, Any]:
    table: Mapping[str, Any] = json.loads(TABLE.read_text(encoding="utf-8"))["networks"]
    return table
