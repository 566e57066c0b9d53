"""Images labelled on a cluster by Ray Data: actors that each keep a loaded model, on CPUs or GPUs.

Ray runs a batch again when the machine that had it is lost, and an image's files appear whole, under names that follow from the
image: so no image is lost or labelled twice, and a second call finds finished results by their stamps. All machines must see
the images and the folder of results, on a shared disk; images may also lie behind URLs.
"""

import copy
import io
import json
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from deeplabzoo.data.image_sources import Source, find_images, is_url
from deeplabzoo.errors import ImageError, UsageError
from deeplabzoo.files import write_atomically
from deeplabzoo.inference.batch import OutputOptions, is_up_to_date, label_image_file, settings_hash
from deeplabzoo.inference.inputs import Job, Kind, job_for_folder, prepare_outputs
from deeplabzoo.inference.predictor import Predictor, unwrap_model
from deeplabzoo.log import logger
from deeplabzoo.models.deeplab import DeepLab
from deeplabzoo.optional_imports import require_module

if TYPE_CHECKING:
    import numpy as np


_KINDS: tuple[Kind, ...] = ("labels", "json")
_BATCH = 8
"""Images that an actor takes at a time, at most; unfinished ones are labelled again when the actor is lost."""


@dataclass(frozen=True)
class LabelSummary:
    """The outcome of a run over many images."""

    photos: int
    """Number of images."""
    done_before: int
    """Images whose files were there, computed with the same weights and settings."""
    failed: Mapping[str, str]
    """Image -> why it could not be read."""
    areas: Path
    """Parquet file: photo, labels, height, width, class, name, pixels, share; a row for each class found in an image."""


class LabelBatch:
    """A class for Ray's `map_batches`, which makes actors of it: each loads one model and labels batch after batch with it.

    A batch has the columns `photo` (a path or URL) and `name` (of its results, without suffix, below `out`). Written are
    `NAME_labels.png`, a palette image of class numbers, and `NAME.json`, the areas. The result has the same rows in the same
    order with `done_before`, `areas` (the JSON as text, empty where the image failed) and `error` (empty where it did not).

        net = deeplabzoo.create("deeplabv3plus_mobilenetv2_voc", pretrained=True)
        photos.map_batches(LabelBatch, fn_constructor_args=(pickle.dumps(net), "out"), concurrency=4, num_gpus=1, batch_size=8)

    Args:
        net: Pickled DeepLab; it travels with the actor, so that no machine has to find weights.
        out: Folder of results.
        device: "auto" or a torch device.
        threads: Threads of PyTorch in this actor.
    """

    def __init__(self, net: bytes, out: str, device: str = "auto", threads: int | None = None) -> None:
        if threads is not None:
            torch.set_num_threads(threads)
        self._predictor = Predictor(pickle.loads(net), device)
        self._settings, self._out = settings_hash(self._predictor), Path(out)
        self._options = OutputOptions(0.5, True, {"weights": self._predictor.net.weights_source}, self._settings)

    def __call__(self, batch: "dict[str, np.ndarray[Any, Any]]") -> dict[str, list[Any]]:
        """Label the images that are not finished yet and return the rows."""
        rows = [self._label_row(str(image), str(name)) for image, name in zip(batch["photo"], batch["name"], strict=True)]
        return {key: [row[key] for row in rows] for key in ("photo", "name", "done_before", "areas", "error")}

    def _label_row(self, image: str, name: str) -> dict[str, Any]:
        job = image_job(image, name, self._out)
        done = is_up_to_date(job, self._settings, alpha=self._options.alpha, legend=self._options.legend)
        error = ""
        if not done:
            outcome = label_image_file(self._predictor, job, self._options)
            error = outcome.line if outcome.failed else ""
        areas = "" if error else job.files["json"].read_text(encoding="utf-8")
        return {"photo": image, "name": name, "done_before": done, "areas": areas, "error": error}


def label_files(
    paths: Sequence[str] | str,
    out: str | Path,
    model: DeepLab | str,
    workers: int = 2,
    gpus: float = 0,
    *,
    cpus: int = 1,
    recursive: bool = False,
) -> LabelSummary:
    """Label images on the cluster that Ray is connected to, or on this machine: PNGs of labels, JSON and one Parquet of areas.

    `ray.init` is called here where the caller has not. Images that cannot be read do not stop the others.

    Args:
        paths: Files, folders, patterns, lists and URLs as the `predict` command takes them.
        out: Folder of results; its `areas.parquet` covers every image, also those finished before.
        model: A DeepLab, the name of one with pretrained weights, or a checkpoint file.
        workers: Number of actors.
        gpus: GPUs per actor, such as 1 or 0.5; 0 means CPU.
        cpus: Threads per actor.
        recursive: Search the folders below a folder too.

    Returns:
        Numbers of images and failures, and the Parquet file.

    Raises:
        ImageError: There is no image, or none can be read.
        UsageError: Less than one worker or thread.
        DeepLabZooError: Ray is not installed (`deeplabzoo[ray]`).
        OutputError: A file cannot be written.
    """
    if workers < 1 or cpus < 1 or gpus < 0:
        raise UsageError(f"Expected workers and cpus from 1 and gpus from 0, not workers={workers}, cpus={cpus}, gpus={gpus}.")
    ray = require_module("ray", extra="ray", purpose="labelling on a cluster")
    data = require_module("ray.data", extra="ray", purpose="labelling on a cluster")
    out = Path(out).absolute()
    sources = find_images([paths] if isinstance(paths, str) else paths, recursive=recursive, out=out)
    # absolute paths, as workers have other working folders
    images = [{"photo": one.url or str(one.path.absolute()), "name": one.name.as_posix()} for one in sources]
    prepare_outputs([image_job(one["photo"], one["name"], out) for one in images])
    net = _load_model(model)
    if not ray.is_initialized():
        ray.init(log_to_driver=False, include_dashboard=False)
    batch = max(1, min(_BATCH, len(images) // (4 * workers)))
    batches = -(-len(images) // batch)
    rows = (
        data.from_items(images, override_num_blocks=batches)
        .map_batches(
            LabelBatch,
            fn_constructor_args=(pickle.dumps(copy.deepcopy(net).to("cpu")), str(out), "cuda" if gpus else "cpu", cpus),
            concurrency=min(workers, batches),
            num_cpus=cpus,
            num_gpus=gpus,
            batch_size=batch,
        )
        .take_all()
    )
    rows.sort(key=lambda row: row["name"])
    areas = out / "areas.parquet"
    _write_areas(areas, rows)
    done = sum(row["done_before"] for row in rows)
    if done:
        logger.info(f"skipped {done} of {len(rows)} images: done before with the same weights and settings")
    return LabelSummary(len(rows), done, {row["photo"]: row["error"] for row in rows if row["error"]}, areas)


def image_job(image: str, name: str, out: Path) -> Job:
    """Return the job of a row: an image's path or URL, and the name of its results below `out`."""
    url = image if is_url(image) else None
    return job_for_folder(Source(Path(image), Path(name), url), out, _KINDS)


def _load_model(model: DeepLab | str) -> DeepLab:
    if not isinstance(model, str):
        net: DeepLab = unwrap_model(model, "label_files")
        return net
    import deeplabzoo

    return deeplabzoo.load(model) if Path(model).is_file() else deeplabzoo.create(model, pretrained=True)


def _write_areas(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write one table of all images' areas atomically."""
    pyarrow = require_module("pyarrow", extra="ray", purpose="writing Parquet")
    parquet = require_module("pyarrow.parquet", extra="ray", purpose="writing Parquet")
    table = []
    for row in rows:
        if row["areas"]:
            found = json.loads(row["areas"])
            same = {
                "photo": row["photo"],
                "labels": f"{row['name']}_labels.png",
                "height": found["height"],
                "width": found["width"],
            }
            table += [
                {**same, "class": area["index"], "name": area["name"], "pixels": area["pixels"], "share": area["share"]}
                for area in found["classes"]
            ]
    if not table:
        raise ImageError(f"None of the {len(rows)} images could be read: {next(row['error'] for row in rows)}")
    buffer = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(table), buffer)
    write_atomically(path, lambda file: file.write(buffer.getvalue()))
