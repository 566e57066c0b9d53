"""Time and peak memory from file to file against image area, each size in its own process so that peaks are separate.

`python -m benchmarks.suite.scaling JSON` is such a process: it makes the picture, loads the network, labels the file in
tiles into a PNG and answers with one line of JSON.
"""

import json
import logging
import math
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from deeplabzoo.benchmark import library
from deeplabzoo.benchmark.record import Row, Spread
from deeplabzoo.benchmark.timing import peak_of
from deeplabzoo.errors import DeepLabZooError, UsageError
from deeplabzoo.hub.factory import load_named_model
from deeplabzoo.inference.large_predict import LargeResult, predict_to_files
from deeplabzoo.inference.predictor import Predictor
from deeplabzoo.inference.tiling import TILE

TASK = "file -> labels file"
MODEL = "deeplabv3plus_mobilenetv2_voc"
"""What is run where no model is named: it ships with the package."""
MEGAPIXELS = (0.25, 1.0, 4.0, 16.0, 25.0, 64.0, 100.0)
_SEGMENT = 512
"""Side of the tiles inside the TIFF."""
_KINDS = 24
"""Different ones; a picture repeats them in random order."""


def scaling_rows(model: str, megapixels: Sequence[float], *, threads: int, seed: int, note: str = "") -> Iterator[list[Row]]:
    """Yield a row for each size of a square picture, smallest first; raises UsageError where one cannot be measured."""
    library("tifffile")
    for area in sorted(megapixels):
        side = round(1000 * math.sqrt(area))
        found = _run_in_subprocess({"model": model, "side": side, "threads": threads, "seed": seed})
        yield [
            Row(
                name=model,
                task=TASK,
                side=f"torch fp32, tiles of {TILE}",
                threads=threads,
                size=(side, side),
                ms=Spread.of([1000 * found["seconds"]]),
                figures={"megapixels": side * side / 1e6, **found},
                note=note,
            )
        ]


def write_synthetic_tiff(path: Path, side: int, seed: int) -> None:
    """Write a square picture of any size, deflated tiles of large and small structures, holding a few tiles at a time."""
    rng = np.random.default_rng(seed)
    kinds = [zlib.compress(_synthetic_segment(rng).tobytes(), 1) for _ in range(_KINDS)]
    across = -(-side // _SEGMENT)
    library("tifffile").imwrite(
        path,
        (kinds[int(kind)] for kind in rng.integers(0, _KINDS, across * across)),
        shape=(side, side, 3),
        dtype=np.uint8,
        tile=(_SEGMENT, _SEGMENT),
        compression="zlib",
        photometric="rgb",
        metadata=None,
    )


def _synthetic_segment(rng: np.random.Generator) -> np.ndarray[Any, np.dtype[np.uint8]]:
    coarse = Image.fromarray(rng.integers(0, 256, (7, 7, 3), np.uint8)).resize((_SEGMENT, _SEGMENT), Image.Resampling.BICUBIC)
    grain = rng.integers(-20, 21, (_SEGMENT, _SEGMENT, 1), np.int16)
    pixels_HWC: np.ndarray[Any, np.dtype[np.uint8]] = np.clip(np.asarray(coarse, np.int16) + grain, 0, 255).astype(np.uint8)
    return pixels_HWC


def _run_in_subprocess(given: dict[str, Any]) -> dict[str, float]:
    words = [sys.executable, "-m", "benchmarks.suite.scaling", json.dumps(given)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    lines = done.stdout.splitlines()
    if not lines:
        last = (done.stderr.strip().splitlines() or ["no word"])[-1]
        raise UsageError(f"The process for {given['side']} x {given['side']} pixels ended early: {last}")
    found: dict[str, Any] = json.loads(lines[-1])
    if "error" in found:
        raise UsageError(found["error"])
    return found


def _measured(given: dict[str, Any]) -> dict[str, float]:
    """Return `seconds`, `tiles`, and what `peak_of` found: above the loaded network that has already run once."""
    torch.set_num_threads(given["threads"])
    predictor = Predictor(load_named_model(given["model"], None), "cpu", "torch", tile=TILE)
    with tempfile.TemporaryDirectory(prefix="deeplabzoo-benchmark-") as place:
        small, image = Path(place) / "small.tif", Path(place) / "made.tif"
        write_synthetic_tiff(small, 64, given["seed"])
        predict_to_files(predictor, small, {"labels": Path(place) / "small.png"})
        write_synthetic_tiff(image, given["side"], given["seed"])
        results: list[LargeResult] = []
        begun = time.perf_counter()
        memory = peak_of(
            lambda: results.append(predict_to_files(predictor, image, {"labels": Path(place) / "labels.png"})),
            torch.device("cpu"),
        )
        return {"seconds": time.perf_counter() - begun, "tiles": results[0].tiles, **memory}


def main(given: str) -> int:
    """Print what was measured, or why it was not."""
    logging.getLogger("deeplabzoo").setLevel(logging.WARNING)  # the parent says what there is to say
    try:
        print(json.dumps(_measured(json.loads(given))), flush=True)
    except DeepLabZooError as error:
        print(json.dumps({"error": str(error)}), flush=True)
        return error.exit_status
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
