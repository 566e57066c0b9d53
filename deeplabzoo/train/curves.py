"""curves.png: loss, learning rate and val mIoU of a run, drawn from its log.jsonl."""

from pathlib import Path

import numpy as np

from deeplabzoo.output import write_atomically
from deeplabzoo.say import say
from deeplabzoo.train.log import read_log

_SMOOTHED = 50
"""Pieces that the loss is averaged over for the line that is easy to read."""


def draw_curves(folder: Path, title: str) -> bool:
    """Write `curves.png` beside `log.jsonl`; where matplotlib is absent, say so and return False."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        say("curves.png is not drawn: matplotlib is absent (pip install 'deeplabzoo[train]')")
        return False
    records = read_log(folder / "log.jsonl")
    steps = [record for record in records if record["kind"] == "step"]
    evaluations = [record for record in records if record["kind"] == "evaluation"]
    figure = Figure(figsize=(8, 7), layout="constrained")
    FigureCanvasAgg(figure)
    loss, miou, rate = figure.subplots(3, 1, sharex=True, height_ratios=[3, 3, 1])
    if steps:
        at, values = np.array([one["step"] for one in steps]), np.array([one["loss"] for one in steps])
        loss.plot(at, values, color="tab:blue", alpha=0.25, linewidth=0.8, label="train, each step")
        parts = max(1, min(_SMOOTHED, len(values)))
        means = [
            (chunk_at.mean(), chunk.mean())
            for chunk_at, chunk in zip(*(np.array_split(a, parts) for a in (at, values)), strict=True)
        ]
        loss.plot(*zip(*means, strict=True), color="tab:blue", label="train, mean")
        rate.plot(at, [one["lr"] for one in steps], color="tab:grey")
        bottom, top = 0.0, float(np.quantile(values, 0.99)) * 1.1
        loss.set_ylim(min(bottom, float(values.min())), top if top > 0 else None)
    if evaluations:
        scored = [one for one in evaluations if one["miou"] is not None]
        loss.plot(
            [one["step"] for one in evaluations], [one["loss"] for one in evaluations], "o-", color="tab:orange", label="val"
        )
        miou.plot([one["step"] for one in scored], [100 * one["miou"] for one in scored], "o-", color="tab:green")
        if scored:
            best = max(scored, key=lambda one: one["miou"])
            miou.annotate(
                f"{100 * best['miou']:.2f}", (best["step"], 100 * best["miou"]), textcoords="offset points", xytext=(0, 6)
            )
    loss.set_ylabel("loss")
    if loss.get_legend_handles_labels()[0]:
        loss.legend(frameon=False)
    miou.set_ylabel("val mIoU (%)")
    rate.set_ylabel("lr")
    rate.set_xlabel("step")
    loss.set_title(title)
    for axes in (loss, miou, rate):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.2)
    write_atomically(folder / "curves.png", lambda file: figure.savefig(file, dpi=120, format="png"))
    return True
