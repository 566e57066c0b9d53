"""The end of a run: the best weights measured on all of val (and test), report.json and curves.png."""

import itertools
import sys
from collections import Counter
from typing import Any

import torch

from deeplabzoo.checkout import commit
from deeplabzoo.data.base import SegmentationData
from deeplabzoo.inference.evaluation import evaluate
from deeplabzoo.models.deeplab import DeepLab
from deeplabzoo.say import say
from deeplabzoo.train.curves import draw_curves
from deeplabzoo.train.folder import RunFolder
from deeplabzoo.train.log import read_log
from deeplabzoo.train.recipe import Recipe
from deeplabzoo.train.splits import Splits
from deeplabzoo.zoo.factory import load

_NAMED = 5


def write_report(net: DeepLab, recipe: Recipe, data: Splits, folder: RunFolder, facts: dict[str, Any]) -> dict[str, Any]:
    """Measure best.safetensors on all of val, and once on test; write report.json and curves.png; return the report."""
    device = next(net.parameters()).device
    best = load(folder.best).to(device)
    val = _scored(best, recipe, data.val, device)
    report = {
        "recipe": recipe.name,
        "model": recipe.model,
        "steps": recipe.steps,
        "seed": recipe.seed,
        "miou": val["miou"],
        "val": val,
        "test": _scored(best, recipe, data.test, device) if data.test else None,
        "last": facts,
        "changed_after": _changed_after(folder),
        "skipped": _skipped(folder),
        "hours": round(facts["seconds"] / 3600, 3),
        "peak_memory_bytes": _peak_memory(device),
        "commit": commit(),
        "command": " ".join(["python -m deeplabzoo.train", *sys.argv[1:]]),
    }
    folder.write_json(folder.report, report)
    title = f"{recipe.name}: val mIoU {100 * val['miou']:.2f} %"
    draw_curves(folder.path, title)
    say(f"{title} over {val['images']} images, best weights of step {facts['best']['step']}; {folder.report}")
    return report


def _changed_after(folder: RunFolder) -> list[int]:
    """Return after which steps the run was resumed with another recipe: such a run cannot be repeated by one command."""
    starts = [(record["step"], record["recipe_sha256"]) for record in read_log(folder.log) if record["kind"] == "start"]
    return [step for (_, before), (step, after) in itertools.pairwise(starts) if before != after]


def _skipped(folder: RunFolder) -> dict[str, int]:
    """Return how often each training picture was left out because it could not be read, and say so where any was."""
    times = Counter(name for record in read_log(folder.log) for name in record.get("skipped", ()))
    if times:
        shown = f"{', '.join(sorted(times)[:_NAMED])}{' …' if len(times) > _NAMED else ''}"
        say(f"{len(times)} training pictures could not be read and were left out {times.total()} times: {shown}")
    return dict(sorted(times.items()))


def _scored(net: DeepLab, recipe: Recipe, data: SegmentationData, device: torch.device) -> dict[str, Any]:
    stride = recipe.evaluation_output_stride
    return evaluate(net, data, output_stride=stride, progress=False, device=device, model=recipe.model).to_dict()


def _peak_memory(device: torch.device) -> int | None:
    """Most memory held at once, in bytes: of the GPU, or of this process."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    try:
        import resource
    except ImportError:  # not on Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
