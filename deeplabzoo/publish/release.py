"""One release: the finished run it is made from, its weights file, its evaluation, and its folder, written atomically."""

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
    """A written release; `net` was read back from its weights file."""

    name: str
    tag: str
    data: str | None
    """Name of the class list; None for other classes, which no manifest row can have."""
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
    """Argument of `create`, `load` and `evaluate`: `name.tag`, `hf-hub:owner/repo` or a file name."""

    @property
    def full_name(self) -> str:
        """`name.tag`."""
        return f"{self.name}.{self.tag}"

    @property
    def metrics_summary(self) -> str:
        """Its mIoU per split."""
        metrics = [f"mIoU {100 * one.miou:.2f} % on {one.data} {one.split}" for one in self.reports]
        return ", ".join(metrics) or "not evaluated"


def require_replaceable(out: Path, run_folder: Path) -> None:
    """Raise UsageError unless `out` is new, empty, or holds nothing but a release."""
    if out.resolve() in (run_folder.resolve(), *run_folder.resolve().parents):
        raise UsageError(f"--out must not be the run's folder or one above it, '{out}'; a release replaces its folder.")
    if not out.exists():
        return
    if not out.is_dir():
        raise UsageError(f"--out '{out}' is a file; name a folder.")
    foreign = _unknown_files(out)
    if foreign:
        raise UsageError(f"--out '{out}' holds files that are not of a release ({foreign[0]}); name another folder.")


def _unknown_files(out: Path) -> list[str]:
    """Return the entries of a folder that are not files of the release in its config.json."""
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
    """Yield an empty folder beside `out` that replaces it when the block ends, and is removed if the block fails.

    Leftovers of a killed process are removed, and a release that it had moved aside is restored. Raises OutputError if folders
    cannot be created or renamed; an existing release is then kept.
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


Chosen = Literal["best", "last"]


@dataclass(frozen=True, eq=False)
class FinishedRun:
    """A finished run; `net` holds the chosen weights in float32."""

    folder: Path
    recipe: Recipe
    report: dict[str, Any]
    chosen: Chosen
    net: DeepLab

    @property
    def step(self) -> int | None:
        """Optimizer steps after which the chosen weights were saved."""
        step = self.net.weights_source.get("trained", {}).get("step")
        return int(step) if step is not None else None

    @property
    def class_list(self) -> str | None:
        """Name of the class list with these classes; None for other classes."""
        matching = [name for name, known in CLASS_LISTS.items() if known.classes == tuple(self.net.classes)]
        return self.recipe.data if self.recipe.data in matching else next(iter(matching), None)


def load_finished_run(path: Path, chosen: Chosen) -> FinishedRun:
    """Read the folder of a finished run; raises UsageError, TrainingError or WeightsError."""
    folder = RunDir(path)
    if not path.is_dir():
        raise UsageError(f"There is no run folder '{path}'; give the --out of a finished `python -m deeplabzoo.train`.")
    recipe = folder.recipe()
    if recipe is None:
        raise UsageError(f"'{path}' is not the folder of a training run: it has no recipe.json.")
    if not folder.report.is_file():
        raise UsageError(
            f"The run in '{path}' is not finished: it has no report.json; resume it with "
            f"`python -m deeplabzoo.train {recipe.name} --root DIR --out {path} --resume`."
        )
    try:
        report = json.loads(folder.report.read_text(encoding="utf-8"))
        measured = report["val"]["weights"]["sha256"]
        report["last"]["recipe_sha256"], report["last"]["data_sha256"], report["hours"], report["val"]["hardware"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TrainingError(
            f"'{folder.report}' is not the report of a run ({error!r}); resume the run to write it again."
        ) from None
    weights = folder.best if chosen == "best" else folder.last
    if chosen == "best" and weights.is_file() and sha256_of(weights) != measured:
        raise TrainingError(f"'{weights}' is not the file that report.json measured: the run was resumed; let it finish.")
    return FinishedRun(path, recipe, report, chosen, load(weights))


def open_run_data(run: FinishedRun, root: Path | None) -> Splits | None:
    """Open the dataset that the run was trained and evaluated on; None without `root`.

    Raises DataError for a folder with other training images or classes than the run's, and what opening it raises.
    """
    if root is None and run.recipe.data != "shapes":
        logger.warning(f"not evaluated: --root was not given, so dataset '{run.recipe.data}' was not found")
        return None
    data = open_splits(run.recipe, root)
    if data.sha256 != run.report["last"]["data_sha256"]:
        raise DataError(f"'{root}' does not hold the {run.recipe.data} images that this run was trained on; check --root.")
    if tuple(data.val.classes) != tuple(run.net.classes):
        raise DataError(f"'{root}' has other classes than this run's weights; check --root.")
    return data


Precision = Literal["fp16", "fp32"]
DTYPES: Mapping[Precision, torch.dtype] = {"fp16": torch.float16, "fp32": torch.float32}

_MAX_DIFFERENCE = 0.05
_MAX_RELATIVE_ERROR = 2.0**-9
"""Of a variance: twice the rounding of normal fp16 numbers; below 6e-5 they become subnormal, then zero."""


def write_weights(net: DeepLab, path: Path, precision: Precision, source: Mapping[str, Any]) -> None:
    """Write `net` to `path` in the format of `DeepLab.save`; `source` is its origin in the metadata.

    Tensors that fp16 cannot represent stay in float32, with a warning. Raises WeightsError for non-finite weights, OutputError.
    """
    broken = [name for name, tensor in net.state_dict().items() if not torch.isfinite(tensor).all()]
    if broken:
        raise WeightsError(
            f"{len(broken)} tensors hold non-finite values (NaN or Inf), such as {broken[0]}; nothing was released."
        )
    kept = not_fp16_representable(net) if precision == "fp16" else []
    if kept:
        shown = f"{', '.join(kept[:3])}{' …' if len(kept) > 3 else ''}"
        logger.warning(f"{len(kept)} tensors are kept in fp32 because fp16 cannot represent their values ({shown})")
    save_checkpoint(net, path, extra=source, dtype=DTYPES[precision], keep_dtype=kept)


def require_logits_parity(difference: float, precision: Precision) -> None:
    """Log the relative difference of the file's logits from the run's; raises WeightsError above 5 %."""
    logger.info(f"logits of the {precision} file differ from the run's by {difference:.1e} of their range")
    if not difference <= _MAX_DIFFERENCE:
        raise WeightsError(f"{precision} changes the logits by {100 * difference:.1f} %; publish with --precision fp32.")


def not_fp16_representable(net: DeepLab) -> list[str]:
    """Return the names of tensors that fp16 cannot represent: values that overflow, variances that become subnormal.

    Batch norm divides by the variance, so its relative error matters; weights are summed, so small ones may be rounded.
    """
    return [name for name, tensor in net.state_dict().items() if tensor.is_floating_point() and _exceeds_fp16(name, tensor)]


def _exceeds_fp16(name: str, tensor: torch.Tensor) -> bool:
    half = tensor.half().to(tensor.dtype)
    if not torch.isfinite(half).all():
        return True
    if not name.endswith("running_var"):
        return False
    return bool(((half - tensor).abs() > _MAX_RELATIVE_ERROR * tensor.abs()).any())


def evaluate_splits(net: DeepLab, run: FinishedRun, data: Splits, device: str | torch.device, model: str) -> list[Report]:
    """Return a report for val and, if the recipe has one, for test; `model` is the MODEL argument in the recorded command."""
    stride = run.recipe.evaluation_output_stride
    reports = []
    for split in filter(None, (data.val, data.test)):
        report = evaluate(net, split, output_stride=stride, device=device, model=model)
        command = [
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
        command += ["--output-stride", str(stride)] if stride else []
        generated = ["python", "-m", "deeplabzoo.publish", "RUN_DIR"]  # generated images are in no folder
        reports.append(dataclasses.replace(report, command=shlex.join(generated if run.recipe.data == "shapes" else command)))
        logger.info(
            f"{split.name} {split.split}: mIoU {100 * report.miou:.2f} % over {report.subset or f'{report.images} images'}"
        )
    return reports


def report_name(full_name: str, report: Report) -> str:
    """Return the file name of a report, e.g. `deeplabv3_mobilenetv2_voc.coral_voc_val-173.json`."""
    return f"{full_name}_{report.data}_{report.split}-{report.images}.json"
