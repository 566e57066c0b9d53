"""The rows of `scaling` as a chart: time and peak memory against image area, both axes logarithmic."""

import io
from pathlib import Path

from benchmarks.suite.scaling import TASK
from deeplabzoo.benchmark import library
from deeplabzoo.benchmark.record import Record
from deeplabzoo.errors import UsageError
from deeplabzoo.files import write_atomically

_TIME, _MEMORY, _LINEAR = "#0072B2", "#D55E00", "#888888"
"""Of Okabe and Ito's colours, which people with any colour vision tell apart."""


def draw_scaling(record: Record, path: Path) -> None:
    """Write a PNG of seconds, with the line that time in proportion to the area would follow, and of megabytes.

    Raises UsageError if no row was measured by `scaling` or matplotlib is missing, and OutputError.
    """
    rows = sorted((row for row in record.rows if row.task == TASK and row.ms), key=lambda row: row.figures["megapixels"])
    if not rows:
        raise UsageError("This chart shows time and memory against the area, and no row has them; run `scaling`.")
    library("matplotlib")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    areas = [row.figures["megapixels"] for row in rows]
    seconds = [row.figures["seconds"] for row in rows]
    figure = Figure(figsize=(8, 3.4), dpi=80, layout="constrained")
    time, memory = figure.subplots(1, 2)
    time.loglog(areas, seconds, "o-", color=_TIME, label="measured")
    per_area = seconds[-1] / areas[-1]
    time.loglog(areas, [per_area * area for area in areas], "--", color=_LINEAR, label="in proportion to the area")
    time.set_ylabel("seconds, file to file")
    time.legend(fontsize=8)
    memory.loglog(areas, [row.figures["peak_mb"] for row in rows], "s-", color=_MEMORY, label="peak above the loaded model")
    pixels = [3 * area for area in areas]
    memory.loglog(areas, pixels, "--", color=_LINEAR, label="the image's pixels")
    memory.set_ylabel("MB")
    memory.legend(fontsize=8)
    for axes in (time, memory):
        axes.set_xlabel("megapixels")
        axes.grid(alpha=0.3)
    threads = f"{record.threads} thread{'s' * (record.threads != 1)}"
    figure.suptitle(f"{rows[0].name}, {rows[0].side}, {threads}\n{record.hardware['cpu']}, {record.date[:10]}", fontsize=9)
    image = io.BytesIO()
    FigureCanvasAgg(figure).print_png(image)  # type: ignore[no-untyped-call]
    write_atomically(path, lambda file: file.write(image.getvalue()))
