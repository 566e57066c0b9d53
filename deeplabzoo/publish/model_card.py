"""The model card of a checkpoint: usage, metrics with their protocol, training, limitations and licences, as Markdown.

One renderer serves both ways of publishing: a finished run (`release_card`) and `DeepLab.push_to_hub` (`pushed_model_card`).
The card opens with the Hub's YAML (`model-index`); every number is taken from reports and manifest rows.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from huggingface_hub import EvalResult, ModelCardData
from PIL import Image

from deeplabzoo.data.image_io import Pixels, read_image
from deeplabzoo.evaluation.report import Report
from deeplabzoo.files import write_atomically
from deeplabzoo.hub.manifest import Metric, WeightRow
from deeplabzoo.hub.model_info import metric_conditions
from deeplabzoo.inference.predictor import Predictor
from deeplabzoo.models.deeplab import DeepLab
from deeplabzoo.models.encoder_table import short_name
from deeplabzoo.publish.release import OVERLAY, Release

EXAMPLE_IMAGE = "photo.jpg"
_OWN_LICENSE = "Apache-2.0"
_TITLES = {"deeplabv3": "DeepLabV3", "deeplabv3plus": "DeepLabV3+"}
_METRIC_TYPES = {"mIoU": "mean_iou", "pixel accuracy": "pixel_accuracy"}
"""Our name of a metric -> the Hub's."""
_LOCAL_DATASETS = ("folder", "shapes")
"""Datasets of recipes that are no datasets of the Hub."""
_NUM_WEAKEST_CLASSES = 3


@dataclass(frozen=True, eq=False, kw_only=True)
class ModelCard:
    """The sections of a card; an empty one is left out."""

    front_matter: ModelCardData
    title: str
    summary: str
    overlay: str | None
    """File name of the example image beside the card."""
    load: str
    """Python expression that gives the model."""
    note: str = ""
    metrics: str
    training: str
    curves: str | None = None
    limitations: Sequence[str]
    licences: Sequence[tuple[str, str]]

    def render(self) -> str:
        """Return the card as Markdown."""
        use = f'net = {self.load}\ndeeplabzoo.Predictor(net)("photo.jpg").overlay().save("overlay.png")'
        parts = [
            f"---\n{self.front_matter.to_yaml()}\n---",
            f"# {self.title}",
            self.summary,
            f"![Example prediction]({self.overlay})" if self.overlay else "",
            f"## Usage\n\n```python\nimport deeplabzoo\n\n{use}\n```",
            self.note,
            f"## Metrics\n\n{self.metrics}",
            f"## Training\n\n{self.training}",
            f"![Loss, val mIoU and learning rate]({self.curves})" if self.curves else "",
            "## Limitations\n\n" + "\n".join(f"- {line}" for line in self.limitations),
            "## Licences\n\n" + "\n".join(f"- {what}: {terms}" for what, terms in self.licences),
        ]
        return "\n\n".join(filter(None, parts)) + "\n"


@dataclass(frozen=True, eq=False)
class PushedModel:
    """What is known about a model that `DeepLab.push_to_hub` uploads."""

    net: DeepLab
    repo: str
    row: WeightRow | None
    """Manifest row of the released checkpoint whose tensors these are, unchanged."""
    metrics: tuple[Metric, ...]
    license: str | None
    """Licence of the weights; None if it was not given."""


def release_card(release: Release, *, curves: str | None, overlay: str | None) -> str:
    """Return the card of a released run; `curves` and `overlay` are file names of images beside it, None without one."""
    results = [
        _eval_result(report.data, report.split, report.subset, name, round(100 * value, 2))
        for report in release.reports
        for name, value in (("mIoU", report.miou), ("pixel accuracy", report.pixel_accuracy))
    ]
    datasets = [release.training.data] if release.training.data not in _LOCAL_DATASETS else None
    is_file = release.address.endswith(".safetensors")
    return ModelCard(
        front_matter=_front_matter(release.net, release.full_name, results, release.license.weights, datasets=datasets),
        title=release.full_name,
        summary=f"{_summary(release.net)}, {release.bytes / 1e6:.1f} MB, {release.training}.",
        overlay=overlay,
        load=f'deeplabzoo.load("{release.address}")' if is_file else f'deeplabzoo.create("{release.address}", pretrained=True)',
        metrics="\n\n".join(_report_metrics(release)) or "No evaluation results are available.",
        training="\n".join(_training(release)),
        curves=curves,
        limitations=list(_release_limitations(release)),
        licences=[
            ("code", release.license.code),
            ("weights", release.license.weights),
            ("training images", release.license.data),
        ],
    ).render()


def pushed_model_card(model: PushedModel, *, with_example_image: bool) -> str:
    """Return the card of a pushed model; its `model-index` holds only metrics that were measured with deeplabzoo."""
    net, repo, row = model.net, model.repo, model.row
    results = [
        _eval_result(one.data, one.split, one.subset, one.name, one.value)
        for one in model.metrics
        if one.origin == "measured" and one.name in _METRIC_TYPES
    ]
    image = f"https://huggingface.co/{repo}/resolve/main/{EXAMPLE_IMAGE}"
    widget = [{"src": image, "example_title": "photo"}] if with_example_image else None
    row_licences = [("original code", row.license.code), ("training images", row.license.data)] if row else []
    return ModelCard(
        front_matter=_front_matter(net, repo.partition("/")[2], results, model.license, widget=widget),
        title=repo,
        summary=f"{_summary(net)}.",
        overlay=OVERLAY if with_example_image else None,
        load=f'deeplabzoo.create("hf-hub:{repo}")',
        note="`model.safetensors` is sufficient to rebuild the model; `config.json` repeats its metadata in readable form.",
        metrics="\n".join(_metric_table(model)) or "No evaluation results are available.",
        training=_origin(model),
        limitations=list(_pushed_limitations(model)),
        licences=[("weights", model.license or "not stated"), *row_licences],
    ).render()


def _eval_result(data: str, split: str, subset: str | None, name: str, percent: float) -> EvalResult:
    return EvalResult(
        task_type="image-segmentation",
        dataset_type=data,
        dataset_name=f"{data} {split}{f' ({subset})' if subset else ''}",
        dataset_split=split,
        metric_type=_METRIC_TYPES[name],
        metric_name=f"{name} (%)",
        metric_value=percent,
    )


def _front_matter(
    net: DeepLab,
    name: str,
    results: list[EvalResult],
    license: str | None,
    datasets: list[str] | None = None,
    widget: list[dict[str, str]] | None = None,
) -> ModelCardData:
    own = license == _OWN_LICENSE  # the Hub has a short name for it; any other licence is given as text
    return ModelCardData(
        library_name="deeplabzoo",
        pipeline_tag="image-segmentation",
        license="apache-2.0" if own else "other" if license else None,
        license_name=None if own else license,
        datasets=datasets,
        metrics=["mean_iou"],
        tags=["semantic-segmentation", net.config.architecture],
        model_name=name,
        eval_results=results or None,
        widget=widget,
    )


def _summary(net: DeepLab) -> str:
    config = net.config
    millions = sum(parameter.numel() for parameter in net.parameters()) / 1e6
    return (
        f"{_TITLES[config.architecture]} with encoder {short_name(config.encoder)} for {config.num_classes} classes "
        f"({', '.join(net.classes)}): {millions:.2f} M parameters, output stride {config.output_stride}"
    )


def _report_metrics(release: Release) -> Iterator[str]:
    if not release.reports:
        return
    lines = ["| dataset | images | mIoU % | pixel accuracy % | Dice % |", "|---|---|---|---|---|"]
    for report in release.reports:
        values = " | ".join(f"{100 * value:.2f}" for value in (report.miou, report.pixel_accuracy, report.dice))
        lines.append(f"| {report.data} {report.split} | {report.subset or report.images} | {values} |")
    yield "\n".join(lines)
    first = release.reports[0]
    yield (
        f"Evaluation protocol: {first.protocol}. Measured on {first.date[:10]} with the released file "
        f"(sha256 `{release.sha256}`). Reproduce:"
    )
    yield "```\n" + "\n".join(str(report.command) for report in release.reports) + "\n```"
    header = [f"{report.split} IoU %" for report in release.reports]
    rows = [f"| {name} | {' | '.join(_percent(one.per_class[name]) for one in release.reports)} |" for name in first.classes]
    yield "\n".join([f"| class | {' | '.join(header)} |", f"|---|{'---|' * len(header)}", *rows])


def _metric_table(model: PushedModel) -> Iterator[str]:
    if not model.metrics:
        return
    yield "| metric | value | evaluation protocol |"
    yield "|---|---|---|"
    for one in model.metrics:
        yield f"| {one.name} | {one.value:.2f} {one.unit} | {metric_conditions(one)} |"
    yield ""
    yield from (f"- `{one.command}`" for one in model.metrics if one.command and one.name == "mIoU")


def _training(release: Release) -> Iterator[str]:
    run = release.training
    images = f"{run.images} images of " if run.images else ""
    epochs = f" ({run.epochs:g} epochs)" if run.epochs else ""
    step = f"of step {run.step}, selected on val" if run.chosen == "best" else "of the last step"
    names = f", sha256 of the image names `{run.split_sha256}`" if run.split_sha256 else ""
    yield f"- data: {images}{run.data} {run.split}{names}"
    yield f"- initial weights: {run.initial_weights}"
    yield f"- {run.steps} steps{epochs}, seed {run.seed}; weights {step}"
    yield f"- recipe `{run.recipe}`, sha256 `{run.recipe_sha256}`" + (f", source commit `{run.commit}`" if run.commit else "")
    yield f"- {run.hours:.2f} hours of training on {run.hardware}, torch {run.torch}, {run.date}"
    yield ""
    yield f"```\n{run.command}\n```"


def _origin(model: PushedModel) -> str:
    source = model.net.weights_source
    if model.row:
        return f"The weights are those of `{model.row.full_name}`, unchanged. {model.row.notes}".rstrip()
    if source.get("name"):
        return f"Fine-tuned or adapted from `{source['name']}.{source['tag']}`; training details were not provided."
    return "Training details were not provided."


def _release_limitations(release: Release) -> Iterator[str]:
    run = release.training
    yield _closed_set(release.net)
    if run.images:
        yield f"Trained on {run.images} images; expect lower accuracy with other cameras, scenes or viewpoints."
    if run.chosen == "best" and release.reports:
        yield "The step was selected on val, so the val metrics are slightly optimistic; the test metrics, if given, are not."
    if release.reports and (weakest := _weakest_classes(release.reports[0])):
        yield f"Weakest classes on {release.reports[0].split}: {weakest}."
    for report in release.reports:
        if report.subset:
            yield _on_subset(report.split, report.subset)


def _pushed_limitations(model: PushedModel) -> Iterator[str]:
    yield _closed_set(model.net)
    if not model.metrics:
        yield "Not evaluated: measure it on your own data before you rely on it."
    for one in model.metrics:
        if one.subset and one.name == "mIoU":
            yield _on_subset(one.split, one.subset)


def _closed_set(net: DeepLab) -> str:
    return f"Closed set: every pixel is assigned one of the {net.num_classes} classes, whatever the image shows."


def _on_subset(split: str, subset: str) -> str:
    return f"The {split} metrics are on a {subset} and are not comparable with metrics on the whole split."


def _weakest_classes(report: Report) -> str:
    present = sorted((value, name) for name, value in report.per_class.items() if value is not None)
    if len(present) <= _NUM_WEAKEST_CLASSES:
        return ""
    return ", ".join(f"{name} ({100 * value:.1f} %)" for value, name in present[:_NUM_WEAKEST_CLASSES])


def _percent(value: float | None) -> str:
    return "absent" if value is None else f"{100 * value:.2f}"


# Images of a card: an overlay, and the curves of the run.

_MAX_SIDE_PX = 720
_NUM_COLORS = 48


def read_thumbnail(source: Path | Pixels) -> Pixels:
    """Read an image and shrink it to 720 pixels at most; raises ImageError."""
    image = Image.fromarray(read_image(source))
    image.thumbnail((_MAX_SIDE_PX, _MAX_SIDE_PX), Image.Resampling.LANCZOS)
    return np.asarray(image)


def draw_overlay(net: DeepLab, image_HWC: Pixels, path: Path) -> None:
    """Write the prediction over an image, with its legend, as JPEG; raises OutputError."""
    overlay = Predictor(net, device="cpu")(image_HWC).overlay().convert("RGB")
    write_atomically(path, lambda file: overlay.save(file, format="JPEG", quality=88))


def copy_curves(source: Path, path: Path) -> bool:
    """Copy the curves of a run with a small palette, a third of the bytes; False if the run has none."""
    if not source.is_file():
        return False
    with Image.open(source) as curves:
        quantized = curves.convert("RGB").quantize(_NUM_COLORS, dither=Image.Dither.NONE)
    write_atomically(path, lambda file: quantized.save(file, format="PNG", optimize=True))
    return True
