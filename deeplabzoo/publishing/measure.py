"""Figures of the very file that is released: the recipe's val split and its test split, single scale, whole pictures."""

import dataclasses
import shlex

import torch

from deeplabzoo.inference.evaluation import evaluate
from deeplabzoo.inference.report import Report
from deeplabzoo.models.deeplab import DeepLab
from deeplabzoo.publishing.run import FinishedRun
from deeplabzoo.say import say
from deeplabzoo.train.splits import Splits


def measured(net: DeepLab, run: FinishedRun, data: Splits, device: str | torch.device, model: str) -> list[Report]:
    """Return one report for val and, if there is one, for test; `model` is how `evaluate` will be told of these weights."""
    stride = run.recipe.evaluation_output_stride
    reports = []
    for split in filter(None, (data.val, data.test)):
        report = evaluate(net, split, output_stride=stride, device=device, model=model)
        words = [
            "python",
            "-m",
            "deeplabzoo.evaluate",
            model,
            "--data",
            run.recipe.data,
            "--root",
            "DIR",
            "--split",
            split.split,
        ]
        words += ["--output-stride", str(stride)] if stride else []
        generated = ["python", "-m", "deeplabzoo.publish", "RUN_DIR"]  # pictures that no folder holds
        reports.append(dataclasses.replace(report, command=shlex.join(generated if run.recipe.data == "shapes" else words)))
        say(f"{split.name} {split.split}: mIoU {100 * report.miou:.2f} % over {report.subset or f'{report.images} images'}")
    return reports


def report_name(full_name: str, report: Report) -> str:
    """Return the file name under which a report is kept, e.g. `deeplabv3_mobilenetv2_voc.coral_voc_val-173.json`."""
    return f"{full_name}_{report.data}_{report.split}-{report.images}.json"
