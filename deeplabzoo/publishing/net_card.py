"""The model card of a network that was pushed from Python: how to load it, what it is, what was measured, what it cannot."""

from collections.abc import Iterator
from dataclasses import dataclass

from deeplabzoo.models.deeplab import DeepLab
from deeplabzoo.publishing.card import eval_result, front_matter, network_in_words
from deeplabzoo.publishing.release import OVERLAY
from deeplabzoo.zoo.manifest import Metric, WeightRow
from deeplabzoo.zoo.table import conditions

PHOTO = "photo.jpg"
_KINDS = {"mIoU": "mean_iou", "pixel accuracy": "pixel_accuracy"}
"""The Hub's word for each of our figures."""


@dataclass(frozen=True, eq=False)
class Published:
    """What is known about a network on its way to the Hub."""

    net: DeepLab
    repo: str
    row: WeightRow | None
    """The released file whose tensors these are, unchanged."""
    metrics: tuple[Metric, ...]
    license: str | None
    """Terms of the weights; None where nobody said."""


def net_card(published: Published, *, with_photo: bool) -> str:
    """Return the card as Markdown; `model-index` holds figures measured with deeplabzoo, never what others claim."""
    net, repo = published.net, published.repo
    results = [
        eval_result(one.data, one.split, one.subset, _KINDS[one.name], f"{one.name} (%)", one.value)
        for one in published.metrics
        if one.origin == "measured" and one.name in _KINDS
    ]
    widget = [{"src": f"https://huggingface.co/{repo}/resolve/main/{PHOTO}", "example_title": "photo"}] if with_photo else None
    parts = [
        f"---\n{front_matter(net, repo.partition('/')[2], results, published.license, widget=widget).to_yaml()}\n---",
        f"# {repo}",
        f"{network_in_words(net)}.",
        *([f"![A prediction over a photo]({OVERLAY})"] if with_photo else []),
        f'## Use\n\n```python\nimport deeplabzoo\n\nnet = deeplabzoo.create("hf-hub:{repo}")\n'
        'deeplabzoo.Predictor(net)("photo.jpg").overlay().save("overlay.png")\n```',
        "The file `model.safetensors` rebuilds the network by itself; `config.json` says the same for people.",
        "## Figures\n\n" + "\n".join(_figures(published)),
        "## Origin\n\n" + _origin(published),
        "## Limits\n\n" + "\n".join(f"- {line}" for line in _limits(published)),
        "## Licences\n\n" + "\n".join(_licences(published)),
    ]
    return "\n\n".join(parts) + "\n"


def _figures(published: Published) -> Iterator[str]:
    if not published.metrics:
        yield "None was measured when these weights were pushed."
        return
    yield "| figure | value | how it was found |"
    yield "|---|---|---|"
    for one in published.metrics:
        yield f"| {one.name} | {one.value:.2f} {one.unit} | {conditions(one)} |"
    yield ""
    yield from (f"- `{one.command}`" for one in published.metrics if one.command and one.name == "mIoU")


def _origin(published: Published) -> str:
    source = published.net.weights_source
    if published.row:
        return f"The weights are those of `{published.row.full_name}`, unchanged. {published.row.notes}".rstrip()
    if source.get("name"):
        return f"The network started from `{source['name']}.{source['tag']}` and is not the same any more."
    return "Its owner has not said how it was trained."


def _limits(published: Published) -> Iterator[str]:
    yield f"It knows {published.net.num_classes} classes and gives every pixel one of them, whatever the picture shows."
    if not published.metrics:
        yield "Nobody measured it: evaluate it on pictures of your own before you rely on it."
    for one in published.metrics:
        if one.subset and one.name == "mIoU":
            yield f"The {one.split} figure is of a {one.subset}; it does not compare with one on the whole split."


def _licences(published: Published) -> Iterator[str]:
    yield f"- weights: {published.license or 'not stated'}"
    if published.row:
        yield f"- code that made them: {published.row.license.code}"
        yield f"- training pictures: {published.row.license.data}"
