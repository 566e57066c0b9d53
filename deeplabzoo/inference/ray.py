"""Photos labelled on a cluster by Ray Data: actors that each keep a warm network, on CPUs or GPUs.

Ray runs a batch again when the machine that had it is lost, and a photo's files appear whole, under names that follow from the
photo: so a photo is neither lost nor there twice, and a second call finds what is done by its stamps. All machines must see the
photos and the folder of results, on a shared disk; photos may also lie behind URLs.
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

from deeplabzoo.data.image_sources import Source, find_images
from deeplabzoo.errors import ImageError, UsageError
from deeplabzoo.files import write_atomically
from deeplabzoo.inference.batch import OutputOptions, compute_stamp, is_up_to_date, label_image_file, settings_hash
from deeplabzoo.inference.inputs import Job, job_for_folder, prepare_outputs
from deeplabzoo.inference.predictor import Kind, Predictor
from deeplabzoo.log import logger
from deeplabzoo.models.deeplab import DeepLab
from deeplabzoo.optional_imports import require_module

if TYPE_CHECKING:
    import numpy as np


_KINDS: tuple[Kind, ...] = ("labels", "json")
_BATCH = 8
"""Photos that an actor takes at a time, at most; those of them that are not finished are done again when it is lost."""


@dataclass(frozen=True)
class LabelSummary:
    """What a run over many photos came to."""

    photos: int
    done_before: int
    """Photos whose files were there, made with the same weights and settings."""
    failed: Mapping[str, str]
    """Photo -> why it could not be read."""
    areas: Path
    """Parquet file: photo, labels, height, width, class, name, pixels, share; a row for each class found in a photo."""


class LabelBatch:
    """What `map_batches` makes an actor of: it warms one network up and labels batch after batch with it.

    A batch has the columns `photo` (a path or URL) and `name` (of its results, without suffix, below `out`). Written are
    `NAME_labels.png`, a palette picture of class numbers, and `NAME.json`, the areas. The answer has the same rows in the same
    order with `done_before`, `areas` (the JSON as text, empty where the photo failed) and `error` (empty where it did not).

        net = deeplabzoo.create("deeplabv3plus_mobilenetv2_voc", pretrained=True)
        photos.map_batches(LabelBatch, fn_constructor_args=(pickle.dumps(net), "out"), concurrency=4, num_gpus=1, batch_size=8)

    `net` is a pickled DeepLab: it travels with the actor, so that no machine has to find weights. `threads` are those of
    PyTorch in this actor.
    """

    def __init__(self, net: bytes, out: str, device: str = "auto", threads: int | None = None) -> None:
        if threads is not None:
            torch.set_num_threads(threads)
        self._predictor = Predictor(pickle.loads(net), device)
        self._settings, self._out = settings_hash(self._predictor), Path(out)
        self._output_options = OutputOptions(0.5, True, {"weights": self._predictor.net.weights_source})

    def __call__(self, batch: "dict[str, np.ndarray[Any, Any]]") -> dict[str, list[Any]]:
        """Label what is not done yet and return the rows."""
        rows = [self._label_row(str(photo), str(name)) for photo, name in zip(batch["photo"], batch["name"], strict=True)]
        return {key: [row[key] for row in rows] for key in ("photo", "name", "done_before", "areas", "error")}

    def _label_row(self, photo: str, name: str) -> dict[str, Any]:
        job = image_job(photo, name, self._out)
        stamp = compute_stamp(job.source, self._settings)
        done = is_up_to_date(job, stamp, alpha=self._output_options.alpha, legend=self._output_options.legend)
        error = ""
        if not done:
            outcome = label_image_file(self._predictor, job, self._output_options, stamp)
            error = outcome.line if outcome.failed else ""
        areas = "" if error else job.files["json"].read_text(encoding="utf-8")
        return {"photo": photo, "name": name, "done_before": done, "areas": areas, "error": error}


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
    """Label photos on the cluster that Ray is connected to, or on this machine: PNGs of labels, JSON and one Parquet of areas.

    `paths` are files, folders, patterns, lists and URLs as `predict` takes them. `gpus` is what each worker gets, such as 1 or
    0.5; 0 means CPU, on `cpus` threads each. `areas.parquet` in `out` holds every photo, also those done before. Photos that
    cannot be read do not stop the others and are named in the answer. `ray.init` is called here where the caller has not.

    Raises ImageError if there is no photo, UsageError for less than one worker or thread, DeepLabZooError where Ray is not
    installed (`deeplabzoo[ray]`), OutputError. Source: Ray Data's `map_batches` with an actor pool.
    """
    if workers < 1 or cpus < 1 or gpus < 0:
        raise UsageError(f"Expected workers and cpus from 1 and gpus from 0, not workers={workers}, cpus={cpus}, gpus={gpus}.")
    ray = require_module("ray", extra="ray", purpose="labelling on a cluster")
    data = require_module("ray.data", extra="ray", purpose="labelling on a cluster")
    out = Path(out).absolute()
    sources = find_images([paths] if isinstance(paths, str) else paths, recursive=recursive, out=out)
    # workers have other working folders, so paths are made absolute
    photos = [{"photo": one.url or str(one.path.absolute()), "name": one.name.as_posix()} for one in sources]
    prepare_outputs([image_job(one["photo"], one["name"], out) for one in photos])
    net = _network(model)
    if not ray.is_initialized():
        ray.init(log_to_driver=False, include_dashboard=False)
    batch = max(1, min(_BATCH, len(photos) // (4 * workers)))
    batches = -(-len(photos) // batch)
    rows = (
        data.from_items(photos, override_num_blocks=batches)
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
        logger.info(f"{done} of {len(rows)} were done before, with the same weights and settings")
    return LabelSummary(len(rows), done, {row["photo"]: row["error"] for row in rows if row["error"]}, areas)


def image_job(photo: str, name: str, out: Path) -> Job:
    """Return the job of a row: a photo's path or URL, and the name of its results below `out`."""
    url = photo if "://" in photo else None
    return job_for_folder(Source(Path(photo), Path(name), url), out, _KINDS)


def _network(model: DeepLab | str) -> DeepLab:
    if isinstance(model, DeepLab):
        return model
    import deeplabzoo

    net: DeepLab = deeplabzoo.load(model) if Path(model).is_file() else deeplabzoo.create(model, pretrained=True)
    return net


def _write_areas(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write one table of all photos' areas, whole or not at all."""
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
        raise ImageError(f"None of the {len(rows)} photos could be read: {next(row['error'] for row in rows)}")
    buffer = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(table), buffer)
    write_atomically(path, lambda file: file.write(buffer.getvalue()))
