"""Manifest rows: the row of a release, metrics from evaluation reports, and the config.json beside the weights."""

import dataclasses
import json
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from deeplabzoo.checkpoints.native import FORMAT
from deeplabzoo.data.dataset import split_hash
from deeplabzoo.errors import UnknownNameError, UsageError
from deeplabzoo.evaluation.report import METRIC_FIELDS
from deeplabzoo.hub.http_download import sha256_of
from deeplabzoo.hub.manifest import Manifest, Training, WeightRow
from deeplabzoo.models.config import DeepLabConfig
from deeplabzoo.models.deeplab import DeepLab
from deeplabzoo.publish.release import FinishedRun, Release, report_name
from deeplabzoo.strict_json import decode_dataclass
from deeplabzoo.training.dataloader import Splits
from deeplabzoo.training.recipe import NON_DETERMINING_FIELDS, Recipe
from deeplabzoo.training.recipes import get_recipe

_CONDITION_FIELDS = ("name", "protocol", "data", "split", "images", "output_stride", "scales", "flip", "origin")


def add_report(manifest_text: str, report: Mapping[str, Any], report_path: str | None = None) -> tuple[str, str]:
    """Return the manifest's new text with a report's metrics in the row of the evaluated file, and a summary line.

    A metric of the same protocol is replaced, any other is kept.

    Args:
        manifest_text: The manifest as JSON.
        report: What `evaluate --json` writes.
        report_path: Path of the report in the repository, stored in the row.

    Raises:
        UsageError: A report of a file that is not released (by sha256), of an adapted model, or of part of a split.
        WeightsError: The result would be an invalid manifest.
    """
    plain = json.loads(manifest_text)
    try:
        row = _matching_row(report, plain["rows"])
        metrics = metrics_from_report(report, report_path)
    except (KeyError, TypeError) as error:
        raise UsageError(f"This is not a report of `evaluate --json`: it lacks {error}.") from None
    new = [{key: one[key] for key in _CONDITION_FIELDS} for one in metrics]
    others = [one for one in row["metrics"] if {key: one.get(key) for key in _CONDITION_FIELDS} not in new]
    if any(one.get("per_class") for one in row["metrics"] if one not in others):
        metrics[0]["per_class"] = per_class(report)  # IoU per class belongs to the mIoU that is replaced
    row["metrics"] = [*others, *metrics]
    row["verified"] = "measured here"
    decode_dataclass(Manifest, plain, "manifest.json")
    values = ", ".join(f"{one['name']} {one['value']} %" for one in metrics)
    images_text = report["subset"] or f"{report['images']} images"
    line = f"{row['name']}.{row['tag']}: {values} on {report['data']} {report['split']} ({images_text}) recorded"
    return manifest_json(plain), line


def manifest_json(plain: Mapping[str, Any]) -> str:
    """Return a manifest as text: two spaces of indent, lists of values on one line."""
    text = json.dumps(plain, indent=2, ensure_ascii=False)
    # JSON strings hold no line feeds, so this matches brackets of lists only
    return re.sub(r"\[\n\s*([^\[\]{}]*?)\n\s*\]", lambda found: f"[{_one_line(found[1])}]", text) + "\n"


def _one_line(values: str) -> str:
    return re.sub(r",\n\s*", ", ", values)


def _matching_row(report: Mapping[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
    weights = report["weights"]
    sha256, tag = weights["sha256"], weights.get("tag")
    if not sha256:
        raise UsageError("The report does not name the evaluated file (no sha256), so it belongs to no released checkpoint.")
    if weights.get("adapted"):
        raise UsageError(
            f"The report is of an adapted model ({'; '.join(weights['adapted'])}), not of the released checkpoint."
        )
    if report["limit"]:
        raise UsageError(f"The report covers only part of the split ({report['subset']}); evaluate without --limit.")
    for row in rows:
        named = tag is not None and report["model"] in (row["name"], f"{row['name']}.{tag}") and tag == row["tag"]
        published = row["sha256"] or row["sha256_prefix"]
        if (sha256.startswith(published) and (row["sha256"] or named)) if published else named:
            return row
        if named:
            raise UsageError(
                f"The report of {row['name']}.{tag} is of a file with sha256 {sha256[:12]}…, released is {published[:12]}…."
            )
    raise UsageError(f"No released weights have the sha256 {sha256[:12]}… of this report ({report['model']}).")


def per_class(report: Mapping[str, Any]) -> dict[str, float | None]:
    """Return a report's IoU by class in %; None for absent classes."""
    return {name: None if value is None else round(100 * value, 2) for name, value in report["per_class"].items()}


def metrics_from_report(report: Mapping[str, Any], report_path: str | None = None) -> list[dict[str, Any]]:
    """Return a report's metrics as fields of a row, mIoU first.

    Raises UsageError for a report without its command, KeyError for a mapping that is not a report.
    """
    settings, hardware = report["protocol_settings"], report["hardware"]
    conditions = {
        "unit": "%",
        "protocol": report["protocol"],
        "data": report["data"],
        "split": report["split"],
        "images": report["images"],
        "subset": report["subset"],
        "image_list_sha256": report["image_list_sha256"],
        "output_stride": settings["output_stride"],
        "scales": list(settings["scales"]),
        "flip": settings["flip"],
        "origin": "measured",
        "command": _command(report["command"]),
        "date": report["date"][:10],
        "hardware": str(hardware.get("gpu") or hardware.get("cpu") or hardware.get("device")),
    }
    if report_path:
        conditions["report"] = report_path
    return [{"name": name, "value": round(100 * report[field], 2), **conditions} for name, field in METRIC_FIELDS.items()]


def _command(command: str | None) -> str:
    """Return the command without paths of this machine: the dataset folder and the report."""
    if not command:
        raise UsageError(
            "The report does not name the command that made it; make it with `python -m deeplabzoo.evaluate … --json`."
        )
    arguments: list[str] = []
    tokens = iter(shlex.split(command))
    for argument in tokens:
        option, _, value = argument.partition("=")
        if option == "--json":
            value or next(tokens, "")
        elif option == "--root":
            value or next(tokens, "")
            arguments += ["--root", "DIR"]
        else:
            arguments.append(argument.rpartition("/")[2] if argument.startswith(("/", "~", ".")) else argument)
    return shlex.join(arguments)


REPORTS = "benchmarks/evaluations"
"""Folder of evaluation reports in the repository."""
_ALWAYS = ("architecture", "encoder", "num_classes", "output_stride")


def release_row(release: Release, source: Mapping[str, Any], *, default: bool, reports: str = "") -> dict[str, Any]:
    """Return the row of a release as plain, validated values; `reports` is the folder of its reports.

    Raises UsageError for classes of no known class list, WeightsError for a row that the manifest would refuse.
    """
    require_known_classes(release.data, release.net.classes)
    started = f"Started from: {release.training.initial_weights}."
    chosen = "the step that was best on val" if release.training.chosen == "best" else "the last step"
    row: dict[str, Any] = {
        "name": release.name,
        "tag": release.tag,
        "default": default,
        "origin": FORMAT,
        "source": dict(source),
        "bytes": release.bytes,
        "sha256": release.sha256,
        "sha256_prefix": None,
        "config": _config(release.net.config),
        "preprocessing": release.net.preprocessing.to_dict(),
        "data": release.data,
        "metrics": release_metrics(release, reports),
        "license": dataclasses.asdict(release.license),
        "verified": "measured here" if release.reports else "layout only",
        "notes": f"{started} Weights of {chosen}.",
        "training": dataclasses.asdict(release.training),
    }
    plain: dict[str, Any] = _plain(row)
    decode_dataclass(WeightRow, plain, release.full_name)
    return plain


def require_known_classes(data: str | None, classes: Sequence[str]) -> None:
    """Raise UsageError for classes of no known class list (`data` None), which a manifest cannot hold."""
    if data is None:
        shown = ", ".join(classes[:4]) + (" …" if len(classes) > 4 else "")
        raise UsageError(
            f"The {len(classes)} classes of these weights ({shown}) are no class list of deeplabzoo, so a manifest cannot hold "
            "them; omit --manifest, and use the release folder or --hub."
        )


def release_metrics(release: Release, reports: str = "") -> list[dict[str, Any]]:
    """Return the metrics of all reports; the first one, mIoU on val, also by class."""
    found = []
    for report in release.reports:
        report_path = f"{reports}/{report_name(release.full_name, report)}" if reports else None
        found += metrics_from_report(report.to_dict(), report_path)
    if found:
        found[0]["per_class"] = per_class(release.reports[0].to_dict())
    return found


def release_config(release: Release) -> dict[str, Any]:
    """Return config.json: model, classes, training, metrics and recipe."""
    facts: dict[str, Any] = {
        "library_name": FORMAT,
        "name": release.full_name,
        "sha256": release.sha256,
        **model_facts(release.net),
        "metrics": release_metrics(release),
        "license": dataclasses.asdict(release.license),
        "training": dataclasses.asdict(release.training),
        "recipe": dict(release.recipe),
    }
    plain: dict[str, Any] = _plain(facts)
    return plain


def model_facts(net: DeepLab) -> dict[str, Any]:
    """Return a model's part of config.json: configuration, classes, palette and preprocessing."""
    facts: dict[str, Any] = _plain(
        {
            "config": net.config.to_dict(),
            "classes": net.classes,
            "palette": net.palette,
            "preprocessing": net.preprocessing.to_dict(),
        }
    )
    return facts


def _config(config: DeepLabConfig) -> dict[str, Any]:
    """Return the fields that are not defaults, and the four most important ones."""
    usual = DeepLabConfig(architecture=config.architecture, encoder=config.encoder).to_dict()
    return {key: value for key, value in config.to_dict().items() if key in _ALWAYS or value != usual[key]}


def _plain(value: Any) -> Any:
    """Convert tuples to lists, as a JSON round trip does."""
    if isinstance(value, Mapping):
        return {key: _plain(one) for key, one in value.items()}
    return [_plain(one) for one in value] if isinstance(value, list | tuple) else value


# Training record of a row.

_FILES = (".safetensors", ".tflite", ".pth", ".pt", ".bin")
_WORD = re.compile(r"[A-Za-z][\w.-]*")


def training_record(run: FinishedRun, data: Splits | None) -> Training:
    """Return the training record of a run; training images are counted and hashed if `data` is given."""
    recipe, report = run.recipe, run.report
    assert recipe.steps is not None
    images = len(data.train) if data else None
    return Training(
        recipe=recipe.name,
        recipe_sha256=report["last"]["recipe_sha256"],
        overrides=recipe_overrides(recipe, images),
        commit=report.get("commit"),
        seed=recipe.seed,
        steps=recipe.steps,
        step=run.step,
        epochs=round(recipe.steps * recipe.batch / images, 2) if images else None,
        data=recipe.data,
        split=recipe.train_split,
        images=images,
        split_sha256=split_hash(data.train.names) if data else None,
        initial_weights=initial_weights(recipe),
        chosen=run.chosen,
        hours=float(report["hours"]),
        hardware=_hardware(report["val"]["hardware"], int(report["last"].get("processes", 1))),
        torch=report["val"]["versions"]["torch"],
        date=report["val"]["date"][:10],
        changed_after=tuple(report.get("changed_after", ())),
    )


def recipe_overrides(recipe: Recipe, images: int | None) -> tuple[str, ...]:
    """Return the `--set` arguments that turn the bundled recipe of this name into the one that was trained.

    `images` is the number of training images, which converts epochs to steps. Files are named without their folders.
    """
    try:
        bundled = get_recipe(recipe.name)
    except UnknownNameError:
        return ()
    before = bundled.to_dict()
    if images:  # the number of steps in an epoch depends on the batch size
        before["steps"] = (
            dataclasses.replace(bundled, batch=recipe.batch, accumulate=recipe.accumulate).with_total_steps(images).steps
        )
    return tuple(_differences(before, recipe.to_dict(), ""))


def initial_weights(recipe: Recipe) -> str:
    """Return a description of the initial weights."""
    if recipe.init:
        return _base_name(recipe.init)
    if recipe.encoder_init is True:
        return "encoder: timm's ImageNet weights; head random"
    if recipe.encoder_init == "auto":
        return "encoder: timm's ImageNet weights if available, else random; head random"
    return f"encoder: {_base_name(recipe.encoder_init)}; head random" if recipe.encoder_init else "none: random initialization"


def recipe_without_paths(recipe: Recipe) -> dict[str, Any]:
    """Return the whole recipe as plain values, with files named without their folders."""
    values = recipe.to_dict()
    return {
        key: _base_name(value) if isinstance(value, str) and key in _FILE_FIELDS else value for key, value in values.items()
    }


_FILE_FIELDS = ("init", "encoder_init", "teacher")


def _differences(before: Mapping[str, Any], after: Mapping[str, Any], prefix: str) -> Iterator[str]:
    for key, value in after.items():
        unset = not prefix and key in ("steps", "epochs") and value is None  # setting one unsets the other
        if before.get(key) == value or unset or (not prefix and key in NON_DETERMINING_FIELDS):
            continue
        if isinstance(value, Mapping) and isinstance(before.get(key), Mapping):
            yield from _differences(before[key], value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}={_argument(Path(value).name if key in _FILE_FIELDS and _is_file(value) else value)}"


def _argument(value: Any) -> str:
    """Return a value as `--set` reads it back."""
    if isinstance(value, str) and _WORD.fullmatch(value) and value.lower() not in ("true", "false", "null", "none"):
        return value
    return json.dumps(value, separators=(",", ":"))


def _is_file(source: Any) -> bool:
    return isinstance(source, str) and (Path(source).suffix in _FILES or Path(source).is_file())


def _base_name(source: str) -> str:
    if not _is_file(source):
        return source
    path = Path(source)
    return f"{path.name} (sha256 {sha256_of(path)[:12]})" if path.is_file() else path.name


def _hardware(found: Mapping[str, Any], processes: int) -> str:
    one = str(found.get("gpu") or f"{found.get('cpu')}, {found.get('threads')} threads")
    return one if processes == 1 else f"{processes} x {one}"
