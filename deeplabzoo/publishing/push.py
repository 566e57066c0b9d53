"""A network put on the Hugging Face Hub, where `create("hf-hub:owner/repo")` finds it: weights, facts and a card, one commit.

It is what `DeepLab.push_to_hub` calls. A finished training run is published with more about itself: `deeplabzoo.publish`.
"""

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from PIL import Image

from deeplabzoo.errors import DeepLabZooError, UsageError
from deeplabzoo.inference.report import Report, tensors_sha256
from deeplabzoo.models.checkpoint import FORMAT
from deeplabzoo.models.deeplab import DeepLab
from deeplabzoo.publishing.net_card import PHOTO, Published, net_card
from deeplabzoo.publishing.pictures import draw_overlay, small_photo
from deeplabzoo.publishing.release import CARD, FACTS, OVERLAY, WEIGHTS_ON_HUB
from deeplabzoo.publishing.row import network_facts
from deeplabzoo.publishing.upload import open_repository, upload
from deeplabzoo.publishing.weights import write_weights
from deeplabzoo.say import say
from deeplabzoo.zoo.fitting import fit
from deeplabzoo.zoo.listing import plain_metric
from deeplabzoo.zoo.manifest import Metric, WeightRow, released
from deeplabzoo.zoo.measured import manifest_json
from deeplabzoo.zoo.weights_file import read_released
from deeplabzoo.zoo.wishes import Wishes


def push_to_hub(
    net: DeepLab,
    repo: str,
    *,
    token: str | None,
    private: bool | None,
    commit_message: str | None,
    reports: Sequence[Report],
    license: str | None,
    photo: str | Path | None,
) -> str:
    """Upload a network and return the commit; see `DeepLab.push_to_hub`."""
    row = _row_of(net)
    _require_reports_of(net, reports)
    shown = small_photo(Path(photo)) if photo is not None else None
    open_repository(repo, token=token, private=private)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = {key: value for key, value in net.weights_source.items() if key != "source"}  # a path of this machine
        write_weights(net, folder / WEIGHTS_ON_HUB, "fp32", source)
        metrics = (*(row.metrics if row else ()), *(one for report in reports for one in _metrics(report)))
        published = Published(net, repo, row, metrics, license or (row.license.weights if row else None))
        facts = {
            "library_name": FORMAT,
            **network_facts(net),
            "metrics": [plain_metric(one) for one in metrics],
            "license": published.license,
            "weights": source,
        }
        (folder / FACTS).write_text(manifest_json(facts), encoding="utf-8")
        if shown is not None:
            Image.fromarray(shown).save(folder / PHOTO, quality=90)
            draw_overlay(net, shown, folder / OVERLAY)
        (folder / CARD).write_text(net_card(published, with_photo=shown is not None), encoding="utf-8")
        commit = upload(repo, folder, commit_message or "Weights, facts and card", token=token)
    say(f"hub: hf-hub:{repo}@{commit[:12]}")
    return commit


def _metrics(report: Report) -> Iterator[Metric]:
    settings = report.protocol
    for name, value in (("mIoU", report.miou), ("pixel accuracy", report.pixel_accuracy)):
        yield Metric(
            name=name,
            value=round(100 * value, 2),
            unit="%",
            protocol=str(settings),
            data=report.data,
            split=report.split,
            images=report.images,
            output_stride=settings.output_stride,
            scales=settings.scales,
            flip=settings.flip,
            origin="measured",
            subset=report.subset,
            command=report.command or f'deeplabzoo.evaluate(net, "{report.data}", root, "{report.split}")',
            date=report.date[:10],
        )


def _row_of(net: DeepLab) -> WeightRow | None:
    """Return the released file that these very tensors are of; None once they were trained or adapted.

    What `weights_source` says was true when the file was loaded, so the file itself is read again.
    """
    name, tag = net.weights_source.get("name"), net.weights_source.get("tag")
    row = next((row for row in released() if (row.name, row.tag) == (name, tag)), None)
    if row is None:
        return None
    try:
        original, _ = fit(read_released(row), None, Wishes())
    except DeepLabZooError as error:
        say(f"{row.full_name} cannot be compared with ({error}), so its figures are not put on the card")
        return None
    before, now = original.state_dict(), net.state_dict()
    same = before.keys() == now.keys() and all(torch.equal(tensor, now[key].cpu()) for key, tensor in before.items())
    return row if same and original.config == net.config else None


def _require_reports_of(net: DeepLab, reports: Sequence[Report]) -> None:
    own = tensors_sha256(net) if reports else ""
    for report in reports:
        if report.weights.get("tensors_sha256") != own:
            raise UsageError(
                f"The report of {report.model} on {report.data} {report.split} is of other tensors than this network's; "
                "evaluate the network again before it is pushed."
            )
