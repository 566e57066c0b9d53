"""The model card: how to load the weights, how good they are and under which conditions, how they came to be, what they cannot.

It opens with the Hub's YAML (`model-index`), and reads as a page anywhere else. Every figure is taken from the reports.
"""

from collections.abc import Iterator
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

_OWN_LICENSE = "Apache-2.0"
_WORST = 3


def render_model_card(release: Release, *, curves: str | None, overlay: str | None) -> str:
    """Return the card as Markdown; `curves` and `overlay` are the pictures' names beside it, None where there are none."""
    parts = [
        f"---\n{_front_matter(release).to_yaml()}\n---",
        f"# {release.full_name}",
        _summary_section(release),
        *([f"![A prediction over a photo]({overlay})"] if overlay else []),
        f"## Use\n\n```python\nimport deeplabzoo\n\n{_usage_section(release)}\n```",
        "## Figures\n\n" + "\n\n".join(_metrics_section(release)),
        "## Training\n\n" + "\n".join(_training(release)),
        *([f"![Loss, val mIoU and learning rate of the run]({curves})"] if curves else []),
        "## Limits\n\n" + "\n".join(f"- {line}" for line in _limitations(release)),
        f"## Licences\n\n- code: {release.license.code}\n- weights: {release.license.weights}\n"
        f"- training pictures: {release.license.data}",
    ]
    return "\n\n".join(parts) + "\n"


def _front_matter(release: Release) -> ModelCardData:
    results = [
        eval_result(report.data, report.split, report.subset, kind, name, round(100 * value, 2))
        for report in release.reports
        for kind, name, value in (
            ("mean_iou", "mIoU (%)", report.miou),
            ("pixel_accuracy", "pixel accuracy (%)", report.pixel_accuracy),
        )
    ]
    return front_matter(release.net, release.full_name, results, release.license.weights, [release.training.data])


def eval_result(data: str, split: str, subset: str | None, kind: str, name: str, percent: float) -> EvalResult:
    """Return one measured figure as the Hub's `model-index` has it; a part of a split is called one."""
    return EvalResult(
        task_type="image-segmentation",
        dataset_type=data,
        dataset_name=f"{data} {split}{f' ({subset})' if subset else ''}",
        dataset_split=split,
        metric_type=kind,
        metric_name=name,
        metric_value=percent,
    )


def front_matter(
    net: DeepLab,
    name: str,
    results: list[EvalResult],
    license: str | None,
    datasets: list[str] | None = None,
    widget: list[dict[str, str]] | None = None,
) -> ModelCardData:
    """Return what the Hub reads of a card; without a licence none is claimed."""
    own = license == _OWN_LICENSE  # the Hub knows it by a short name, any other as text
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


def _summary_section(release: Release) -> str:
    return f"{model_summary(release.net)}, {release.bytes / 1e6:.1f} MB, {release.training}."


def model_summary(net: DeepLab) -> str:
    """Return which network it is, of which classes and how large."""
    config = net.config
    title = {"deeplabv3": "DeepLabV3", "deeplabv3plus": "DeepLabV3+"}[config.architecture]
    millions = sum(parameter.numel() for parameter in net.parameters()) / 1e6
    return (
        f"{title} on {short_name(config.encoder)} for {config.num_classes} classes ({', '.join(net.classes)}): "
        f"{millions:.2f} M parameters, output stride {config.output_stride}"
    )


def _usage_section(release: Release) -> str:
    is_file = release.address.endswith(".safetensors")
    made = f'load("{release.address}")' if is_file else f'create("{release.address}", pretrained=True)'
    return f'net = deeplabzoo.{made}\ndeeplabzoo.Predictor(net)("photo.jpg").overlay().save("overlay.png")'


def _metrics_section(release: Release) -> Iterator[str]:
    if not release.reports:
        yield "None was measured when these weights were published."
        return
    lines = ["| data | pictures | mIoU % | pixel accuracy % | Dice % |", "|---|---|---|---|---|"]
    for one in release.reports:
        values = " | ".join(f"{100 * value:.2f}" for value in (one.miou, one.pixel_accuracy, one.dice))
        lines.append(f"| {one.data} {one.split} | {one.subset or one.images} | {values} |")
    yield "\n".join(lines)
    first = release.reports[0]
    yield f"Protocol: {first.protocol}. Measured on {first.date[:10]} from the released file (sha256 `{release.sha256}`) with:"
    yield "```\n" + "\n".join(str(one.command) for one in release.reports) + "\n```"
    header = [f"{one.split} IoU %" for one in release.reports]
    yield "\n".join(
        [
            f"| class | {' | '.join(header)} |",
            f"|---|{'---|' * len(header)}",
            *(f"| {name} | {' | '.join(_percent(one.per_class[name]) for one in release.reports)} |" for name in first.classes),
        ]
    )


def _training(release: Release) -> Iterator[str]:
    run = release.training
    pictures = f"{run.images} pictures of " if run.images else ""
    epochs = f" ({run.epochs:g} epochs)" if run.epochs else ""
    step = f"after step {run.step}, chosen on val" if run.chosen == "best" else "after the last step"
    yield f"- data: {pictures}{run.data} {run.split}" + (f", names' sha256 `{run.split_sha256}`" if run.split_sha256 else "")
    yield f"- initial weights: {run.initial_weights}"
    yield f"- {run.steps} steps{epochs}, seed {run.seed}; weights {step}"
    yield f"- recipe `{run.recipe}`, sha256 `{run.recipe_sha256}`" + (f", source commit `{run.commit}`" if run.commit else "")
    yield f"- {run.hours:.2f} hours of updates on {run.hardware}, torch {run.torch}, {run.date}"
    yield ""
    yield f"```\n{run.command}\n```"


def _limitations(release: Release) -> Iterator[str]:
    run = release.training
    yield f"It knows {release.net.num_classes} classes and gives every pixel one of them, whatever the picture shows."
    if run.images:
        yield f"It was trained on {run.images} pictures; other cameras, scenes or viewpoints will cost accuracy."
    if run.chosen == "best" and release.reports:
        yield "The step was chosen on val, so the val figure is slightly flattering; a test figure, where given, is not."
    if release.reports and (worst := _worst(release.reports[0])):
        yield f"Weakest classes on {release.reports[0].split}: {worst}."
    for report in release.reports:
        if report.subset:
            yield f"The {report.split} figure is of a {report.subset}; it does not compare with one on the whole split."


def _worst(report: Report) -> str:
    known = sorted((value, name) for name, value in report.per_class.items() if value is not None)
    return ", ".join(f"{name} ({100 * value:.1f} %)" for value, name in known[:_WORST]) if len(known) > _WORST else ""


def _percent(value: float | None) -> str:
    return "absent" if value is None else f"{100 * value:.2f}"


# The model card of a network that was pushed from Python: how to load it, what it is, what was measured, what it cannot.


EXAMPLE_IMAGE = "photo.jpg"
_KINDS = {"mIoU": "mean_iou", "pixel accuracy": "pixel_accuracy"}
"""The Hub's word for each of our figures."""


@dataclass(frozen=True, eq=False)
class PushedModel:
    """What is known about a network on its way to the Hub."""

    net: DeepLab
    repo: str
    row: WeightRow | None
    """The released file whose tensors these are, unchanged."""
    metrics: tuple[Metric, ...]
    license: str | None
    """Terms of the weights; None where nobody said."""


def render_pushed_model_card(published: PushedModel, *, with_example_image: bool) -> str:
    """Return the card as Markdown; `model-index` holds figures measured with deeplabzoo, never what others claim."""
    net, repo = published.net, published.repo
    results = [
        eval_result(one.data, one.split, one.subset, _KINDS[one.name], f"{one.name} (%)", one.value)
        for one in published.metrics
        if one.origin == "measured" and one.name in _KINDS
    ]
    widget = (
        [{"src": f"https://huggingface.co/{repo}/resolve/main/{EXAMPLE_IMAGE}", "example_title": "photo"}]
        if with_example_image
        else None
    )
    parts = [
        f"---\n{front_matter(net, repo.partition('/')[2], results, published.license, widget=widget).to_yaml()}\n---",
        f"# {repo}",
        f"{model_summary(net)}.",
        *([f"![A prediction over a photo]({OVERLAY})"] if with_example_image else []),
        f'## Use\n\n```python\nimport deeplabzoo\n\nnet = deeplabzoo.create("hf-hub:{repo}")\n'
        'deeplabzoo.Predictor(net)("photo.jpg").overlay().save("overlay.png")\n```',
        "The file `model.safetensors` rebuilds the network by itself; `config.json` says the same for people.",
        "## Figures\n\n" + "\n".join(_evaluation_section(published)),
        "## Origin\n\n" + _origin(published),
        "## Limits\n\n" + "\n".join(f"- {line}" for line in _limitations_section(published)),
        "## Licences\n\n" + "\n".join(_licences(published)),
    ]
    return "\n\n".join(parts) + "\n"


def _evaluation_section(published: PushedModel) -> Iterator[str]:
    if not published.metrics:
        yield "None was measured when these weights were pushed."
        return
    yield "| figure | value | how it was found |"
    yield "|---|---|---|"
    for one in published.metrics:
        yield f"| {one.name} | {one.value:.2f} {one.unit} | {metric_conditions(one)} |"
    yield ""
    yield from (f"- `{one.command}`" for one in published.metrics if one.command and one.name == "mIoU")


def _origin(published: PushedModel) -> str:
    source = published.net.weights_source
    if published.row:
        return f"The weights are those of `{published.row.full_name}`, unchanged. {published.row.notes}".rstrip()
    if source.get("name"):
        return f"The network started from `{source['name']}.{source['tag']}` and is not the same any more."
    return "Its owner has not said how it was trained."


def _limitations_section(published: PushedModel) -> Iterator[str]:
    yield f"It knows {published.net.num_classes} classes and gives every pixel one of them, whatever the picture shows."
    if not published.metrics:
        yield "Nobody measured it: evaluate it on pictures of your own before you rely on it."
    for one in published.metrics:
        if one.subset and one.name == "mIoU":
            yield f"The {one.split} figure is of a {one.subset}; it does not compare with one on the whole split."


def _licences(published: PushedModel) -> Iterator[str]:
    yield f"- weights: {published.license or 'not stated'}"
    if published.row:
        yield f"- code that made them: {published.row.license.code}"
        yield f"- training pictures: {published.row.license.data}"


# Two small pictures for a model card: a prediction laid over a photo, and the curves of the run.


_MAX_SIDE_PX = 720
_COLOURS = 48


def read_thumbnail(source: Path | Pixels) -> Pixels:
    """Read a photo and shrink it to 720 pixels at most; raises ImageError."""
    picture = Image.fromarray(read_image(source))
    picture.thumbnail((_MAX_SIDE_PX, _MAX_SIDE_PX), Image.Resampling.LANCZOS)
    return np.asarray(picture)


def draw_overlay(net: DeepLab, photo: Pixels, path: Path) -> None:
    """Write the prediction over a photo, with its legend, as JPEG; raises OutputError."""
    picture = Predictor(net, device="cpu")(photo).overlay().convert("RGB")
    write_atomically(path, lambda file: picture.save(file, format="JPEG", quality=88))


def copy_curves(source: Path, path: Path) -> bool:
    """Copy the curves of a run in few colours, a third of the bytes; False where the run drew none."""
    if not source.is_file():
        return False
    with Image.open(source) as whole:
        few = whole.convert("RGB").quantize(_COLOURS, dither=Image.Dither.NONE)
    write_atomically(path, lambda file: few.save(file, format="PNG", optimize=True))
    return True
