"""The memory of a soak as a small chart, from its record: `python tests/trust/memory_chart.py RECORD.json CHART.png`."""

import io
import json
import sys
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from deeplabzoo.files import write_atomically


def draw_memory(record: dict[str, Any], path: Path) -> None:
    """Draw `details.samples`, pairs of (calls so far, resident MB), from zero up: a slope would be seen, noise not enlarged."""
    calls, resident_mb = zip(*record["details"]["samples"], strict=True)
    figure = Figure(figsize=(6.4, 2.6), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(calls, resident_mb, color="#0072B2", linewidth=1.5)
    axes.set_xlim(0, calls[-1])
    axes.set_ylim(0, 1.25 * max(resident_mb))
    axes.set_xlabel("predictions in one process")
    axes.set_ylabel("resident memory (MB)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(record["details"]["title"], fontsize=9, loc="left")
    FigureCanvasAgg(figure)
    picture = io.BytesIO()
    figure.savefig(picture, dpi=100, format="png")
    write_atomically(path, lambda file: file.write(picture.getvalue()))


if __name__ == "__main__":
    draw_memory(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")), Path(sys.argv[2]))
