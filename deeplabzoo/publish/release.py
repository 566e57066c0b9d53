"""One release: everything that its files tell, and the folder that appears whole or not at all."""

import dataclasses
import glob
import json
import secrets
import shlex
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from deeplabzoo.checkpoints.native import save_checkpoint
from deeplabzoo.data.classes import CLASS_LISTS
from deeplabzoo.errors import DataError, OutputError, TrainingError, UsageError, WeightsError
from deeplabzoo.evaluation.evaluate import evaluate
from deeplabzoo.evaluation.report import Report
from deeplabzoo.files import ensure_folder
from deeplabzoo.hub.factory import load
from deeplabzoo.hub.http_download import sha256_of
from deeplabzoo.hub.manifest import License, Training
from deeplabzoo.log import logger
from deeplabzoo.models.deeplab import DeepLab
from deeplabzoo.training.dataloader import Splits, open_splits
from deeplabzoo.training.recipe import Recipe
from deeplabzoo.training.run_dir import RunDir

WEIGHTS_ON_HUB, CARD, ROW, FACTS, CURVES, OVERLAY = (
    "model.safetensors",
    "README.md",
    "row.json",
    "config.json",
    "curves.png",
    "overlay.jpg",
)


@dataclass(frozen=True, eq=False, kw_only=True)
class Release:
    """What is known about the weights once their file is written; `net` was read back from that file."""

    name: str
    tag: str
    data: str | None
    """Name of the class list; None for classes of somebody's own, which no manifest row can have."""
    file: str
    """Name of the weights file."""
    bytes: int
    sha256: str
    net: DeepLab
    training: Training
    recipe: Mapping[str, object]
    reports: Sequence[Report]
    license: License
    address: str
    """How `create`, `load` and `evaluate` are told of these weights: `name.tag`, `hf-hub:owner/repo` or a file name."""

    @property
    def full_name(self) -> str:
        """`name.tag`."""
        return f"{self.name}.{self.tag}"

    @property
    def metrics_summary(self) -> str:
        """Its figures in a few words."""
        figures = [f"mIoU {100 * one.miou:.2f} % on {one.data} {one.split}" for one in self.reports]
        return ", ".join(figures) or "no figure measured"


def require_replaceable(out: Path, run_folder: Path) -> None:
    """Raise UsageError unless `out` may be written: it is new, empty, or a release, never a folder with anything else."""
    if out.resolve() in (run_folder.resolve(), *run_folder.resolve().parents):
        raise UsageError(f"--out must not be the run's folder or one above it, '{out}'; a release replaces its folder.")
    if not out.exists():
        return
    if not out.is_dir():
        raise UsageError(f"--out '{out}' is a file; name a folder.")
    foreign = _unknown_files(out)
    if foreign:
        raise UsageError(f"--out '{out}' holds something that is not of a release ({foreign[0]}); name another folder.")


def _unknown_files(out: Path) -> list[str]:
    """Return what in a folder is no file of the release that its config.json names."""
    entries = sorted(out.iterdir())
    full_name = None
    with suppress(OSError, ValueError, KeyError, TypeError):
        full_name = str(json.loads((out / FACTS).read_text(encoding="utf-8"))["name"])
    own = {CARD, ROW, FACTS, CURVES, OVERLAY} if full_name else set()
    return [
        entry.name
        for entry in entries
        if not entry.is_file() or not (entry.name in own or (full_name and entry.name.startswith(full_name)))
    ]


def _recover_leftovers(out: Path) -> None:
    mark = f".{glob.escape(out.name)}.{'?' * 8}"
    for before in out.parent.glob(f"{mark}.before"):
        if not out.exists():
            before.rename(out)
    for leftover in (*out.parent.glob(f"{mark}.part"), *out.parent.glob(f"{mark}.before")):
        shutil.rmtree(leftover, ignore_errors=True)


@contextmanager
def staged_folder(out: Path) -> Iterator[Path]:
    """Give an empty folder beside `out` that takes its place when the block ends, and vanishes if the block fails.

    What a process that was killed here left behind is removed, and a release that it had put aside is put back. Raises
    OutputError where folders cannot be made or renamed; the release that was there then still is.
    """
    ensure_folder(out.parent)
    mark = secrets.token_hex(4)
    partial, before = (out.with_name(f".{out.name}.{mark}.{word}") for word in ("part", "before"))
    try:
        _recover_leftovers(out)
        partial.mkdir()
        yield partial
        try:
            if out.exists():
                out.rename(before)
            partial.rename(out)
        except OSError:
            if before.exists() and not out.exists():
                before.rename(out)
            raise
    except OSError as error:
        raise OutputError(f"The release cannot be written to '{out}': {error.strerror or error}.") from None
    finally:
        for leftover in (partial, before):
            shutil.rmtree(leftover, ignore_errors=True)


# A finished run, read from its folder: its recipe, its report, and the weights that are to be released.


Chosen = Literal["best", "last"]


@dataclass(frozen=True, eq=False)
class FinishedRun:
    """What a run left; `net` holds the chosen weights as they were trained, in float32."""

    folder: Path
    recipe: Recipe
    report: dict[str, Any]
    chosen: Chosen
    net: DeepLab

    @property
    def step(self) -> int | None:
        """After how many updates the chosen weights were saved."""
        step = self.net.weights_source.get("trained", {}).get("step")
        return int(step) if step is not None else None

    @property
    def class_list(self) -> str | None:
        """Name of the known class list that the outputs have; None for classes of somebody's own."""
        fitting = [name for name, known in CLASS_LISTS.items() if known.classes == tuple(self.net.classes)]
        return self.recipe.data if self.recipe.data in fitting else next(iter(fitting), None)


def load_finished_run(path: Path, chosen: Chosen) -> FinishedRun:
    """Read the folder of a run that has ended; raises UsageError, TrainingError or WeightsError, in one sentence."""
    folder = RunDir(path)
    if not path.is_dir():
        raise UsageError(f"There is no run folder '{path}'; give the --out of a `python -m deeplabzoo.train` that has ended.")
    recipe = folder.recipe()
    if recipe is None:
        raise UsageError(f"'{path}' is not the folder of a training run: it has no recipe.json.")
    if not folder.report.is_file():
        raise UsageError(
            f"The run in '{path}' has not ended: it has no report.json; go on with "
            f"`python -m deeplabzoo.train {recipe.name} --data ROOT --out {path} --resume`."
        )
    try:
        report = json.loads(folder.report.read_text(encoding="utf-8"))
        measured = report["val"]["weights"]["sha256"]
        report["last"]["recipe_sha256"], report["last"]["data_sha256"], report["hours"], report["val"]["hardware"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TrainingError(f"'{folder.report}' is not the report of a run ({error!r}); end the run again.") from None
    weights = folder.best if chosen == "best" else folder.last
    if chosen == "best" and weights.is_file() and sha256_of(weights) != measured:
        raise TrainingError(f"'{weights}' is not the file that report.json measured: the run was taken up again; let it end.")
    return FinishedRun(path, recipe, report, chosen, load(weights))


def open_run_data(run: FinishedRun, root: Path | None) -> Splits | None:
    """Open the data that the run was trained and measured on; None, and said, where nobody told where they are.

    Raises DataError for a folder that holds other training pictures than the run's, and what opening it raises.
    """
    if root is None and run.recipe.data != "shapes":
        logger.info(f"figures: none is recorded, as --data does not say where '{run.recipe.data}' is")
        return None
    data = open_splits(run.recipe, root)
    if data.sha256 != run.report["last"]["data_sha256"]:
        raise DataError(f"'{root}' does not hold the {run.recipe.data} pictures that this run was trained on; check --data.")
    if tuple(data.val.classes) != tuple(run.net.classes):
        raise DataError(f"'{root}' has other classes than this run's weights; check --data.")
    return data


# The released weights file: one safetensors that rebuilds its network, in half precision where that changes nothing.


Precision = Literal["fp16", "fp32"]
DTYPES: Mapping[Precision, torch.dtype] = {"fp16": torch.float16, "fp32": torch.float32}

_MAX_DIFFERENCE = 0.05
_MAX_RELATIVE_ERROR = 2.0**-9
"""Of a variance, relative: twice the rounding of normal half-precision numbers; below 6e-5 they lose digits, then vanish."""


def write_weights(net: DeepLab, path: Path, precision: Precision, source: Mapping[str, Any]) -> None:
    """Write `net` to `path` with what is needed to rebuild it; `source` says where it comes from.

    Tensors that half precision cannot hold stay in float32, and are named in one line. Raises WeightsError for weights that
    are no numbers, OutputError.
    """
    broken = [name for name, tensor in net.state_dict().items() if not torch.isfinite(tensor).all()]
    if broken:
        raise WeightsError(
            f"{len(broken)} tensors hold values that are no finite numbers ({broken[0]}), so nothing is released."
        )
    kept = not_fp16_representable(net) if precision == "fp16" else []
    if kept:
        shown = f"{', '.join(kept[:3])}{' …' if len(kept) > 3 else ''}"
        logger.info(f"precision: {len(kept)} tensors stay in fp32, as fp16 cannot hold their values ({shown})")
    save_checkpoint(net, path, extra=source, dtype=DTYPES[precision], keep_dtype=kept)


def require_logits_parity(difference: float, precision: Precision) -> None:
    """Say by how much the file's logits differ from the run's own weights; raises WeightsError where that is too much."""
    logger.info(f"precision: logits of the {precision} file differ from the run's own by {difference:.1e} of their range")
    if not difference <= _MAX_DIFFERENCE:
        raise WeightsError(f"{precision} changes the logits by {100 * difference:.1f} %; publish with --precision fp32.")


def not_fp16_representable(net: DeepLab) -> list[str]:
    """Return the names of tensors that float16 cannot hold: values that overflow, variances that lose digits or vanish.

    A variance is divided by, so its relative error counts; a weight is added up, so a small one may be rounded coarsely.
    """
    return [name for name, tensor in net.state_dict().items() if tensor.is_floating_point() and _exceeds_fp16(name, tensor)]


def _exceeds_fp16(name: str, tensor: torch.Tensor) -> bool:
    half = tensor.half().to(tensor.dtype)
    if not torch.isfinite(half).all():
        return True
    if not name.endswith("running_var"):
        return False
    return bool(((half - tensor).abs() > _MAX_RELATIVE_ERROR * tensor.abs()).any())


# Figures of the very file that is released: the recipe's val split and its test split, single scale, whole pictures.


def evaluate_splits(net: DeepLab, run: FinishedRun, data: Splits, device: str | torch.device, model: str) -> list[Report]:
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
        logger.info(
            f"{split.name} {split.split}: mIoU {100 * report.miou:.2f} % over {report.subset or f'{report.images} images'}"
        )
    return reports


def report_name(full_name: str, report: Report) -> str:
    """Return the file name under which a report is kept, e.g. `deeplabv3_mobilenetv2_voc.coral_voc_val-173.json`."""
    return f"{full_name}_{report.data}_{report.split}-{report.images}.json"
