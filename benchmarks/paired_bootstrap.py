"""Is one model better than another, or only luckier? Both label the same pictures, then the pictures are drawn anew.

`python -m benchmarks.paired_bootstrap A B --data voc --root DIR --json FILE`: each picture's confusion matrices are kept, and
10 000 samples of pictures with replacement give the spread of each mIoU and of their difference. Single scale, whole pictures.
"""

import argparse
import datetime
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from deeplabzoo.cli.parser import Parser, run
from deeplabzoo.data.classes import subset_note
from deeplabzoo.data.dataset import SegmentationDataset, build_dataset
from deeplabzoo.device import choose_device, eval_mode
from deeplabzoo.evaluation.metrics import ConfusionMatrix
from deeplabzoo.evaluation.report import hardware
from deeplabzoo.files import write_atomically
from deeplabzoo.hub.factory import load_named_model
from deeplabzoo.models.deeplab import DeepLab
from deeplabzoo.processing.preprocessing import image_labels, prepare

Counts = npt.NDArray[np.int64]
_PERCENTILES = (2.5, 97.5)
_BAND_PIXELS = 250


def picture_counts(net: DeepLab, data: SegmentationDataset) -> Counts:
    """Return one confusion matrix a picture, N x K x K (rows true, columns predicted)."""
    found = []
    with eval_mode(net):
        for index in tqdm(range(len(data)), desc="label", unit="image", disable=None):
            matrix = ConfusionMatrix(len(data.classes), data.ignore_index)
            sample = data[index]
            matrix.update(image_labels(net, prepare(sample.image, net.preprocessing)), sample.labels)
            found.append(matrix.counts.copy())
    return np.stack(found)


def mean_iou(counts_SKK: npt.NDArray[np.floating[Any] | np.integer[Any]]) -> npt.NDArray[np.float64]:
    """Return the mIoU of each of S confusion matrices: the mean over classes whose union is not empty."""
    counts = counts_SKK.astype(np.float64)
    hit = np.diagonal(counts, axis1=1, axis2=2)
    union = counts.sum(1) + counts.sum(2) - hit
    iou = np.divide(hit, union, out=np.full_like(hit, np.nan), where=union > 0)
    means: npt.NDArray[np.float64] = np.nanmean(iou, axis=1)
    return means


def bootstrap(first: Counts, second: Counts, *, samples: int, seed: int) -> dict[str, Any]:
    """Return mIoU in % of both and of the difference first - second, with 95 % intervals, from the same drawn pictures."""
    generator = np.random.default_rng(seed)
    flat = [one.reshape(len(one), -1).astype(np.float64) for one in (first, second)]
    drawn: list[list[npt.NDArray[np.float64]]] = [[], []]
    for start in range(0, samples, _BAND_PIXELS):
        rows = min(_BAND_PIXELS, samples - start)
        times = generator.multinomial(len(first), np.full(len(first), 1 / len(first)), size=rows).astype(np.float64)
        for which, matrix in enumerate(flat):
            drawn[which].append(mean_iou((times @ matrix).reshape(rows, *first.shape[1:])))
    a, b = (np.concatenate(one) for one in drawn)
    whole = [float(mean_iou(one.sum(0, keepdims=True))[0]) for one in (first, second)]
    return {
        "first_miou_percent": _summary(whole[0], a),
        "second_miou_percent": _summary(whole[1], b),
        "difference_points": _summary(whole[0] - whole[1], a - b),
        "share_of_samples_in_which_first_is_better": round(float((a > b).mean()), 4),
    }


def _summary(value: float, samples: npt.NDArray[np.float64]) -> dict[str, float]:
    low, high = (float(one) for one in np.percentile(samples, _PERCENTILES))
    figures = {"value": value, "standard_deviation": float(samples.std()), "low_95": low, "high_95": high}
    return {name: round(100 * one, 2) for name, one in figures.items()}


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser("paired_bootstrap", "Compare two models on the same pictures, with intervals.")
    parser.prog = "python -m benchmarks.paired_bootstrap"
    parser.add_argument("first", metavar="MODEL")
    parser.add_argument("second", metavar="MODEL")
    parser.add_argument("--data", required=True)
    parser.add_argument("--root", required=True, type=Path)
    parser.add_argument("--split", default="val")
    parser.add_argument("--samples", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the record here instead of printing it")
    return parser.parse_args(argv)


def bootstrap_command(argv: Sequence[str] | None = None) -> int:
    """Label, draw, and write the record; raises DeepLabZooError where a model or the data cannot be used."""
    args = _options(argv)
    counts, names = [], []
    for model in (args.first, args.second):
        net = load_named_model(model, None)
        data = build_dataset(args.data, args.root, args.split, classes=net.classes)
        counts.append(picture_counts(net, data))
        names.append({"model": model, "sha256": net.weights_source.get("sha256")})
    record = {
        "models": names,
        "data": data.name,
        "split": data.split,
        "images": len(data),
        "subset": subset_note(data.name, data.split, len(data)),
        "protocol": "single scale; whole pictures drawn with replacement, the same for both; percentiles 2.5 and 97.5",
        "samples": args.samples,
        "seed": args.seed,
        **bootstrap(*counts, samples=args.samples, seed=args.seed),
        "hardware": hardware(choose_device("cpu")),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    text = json.dumps(record, indent=2) + "\n"
    if args.json:
        write_atomically(args.json, lambda file: file.write(text.encode()))
    else:
        print(text, end="")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    return run(bootstrap_command, argv)


if __name__ == "__main__":
    sys.exit(main())
