"""The steps of publishing, from top to bottom: check, write, read back, measure, describe, hand out."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deeplabzoo.data.images import Pixels
from deeplabzoo.errors import UsageError
from deeplabzoo.inference.golden import golden_difference, save_golden
from deeplabzoo.models.encoder_table import short_name
from deeplabzoo.output import write_atomically
from deeplabzoo.publishing import bundle
from deeplabzoo.publishing.card import card
from deeplabzoo.publishing.handout import beside_manifest, to_hub
from deeplabzoo.publishing.measure import measured, report_name
from deeplabzoo.publishing.pictures import copy_curves, draw_overlay, small_photo
from deeplabzoo.publishing.provenance import recipe_without_paths, training_of
from deeplabzoo.publishing.release import (
    CARD,
    CURVES,
    FACTS,
    OVERLAY,
    ROW,
    WEIGHTS_ON_HUB,
    Release,
    require_replaceable,
    staged,
)
from deeplabzoo.publishing.row import REPORTS, facts_of, require_known_classes, row_of
from deeplabzoo.publishing.run import Chosen, FinishedRun, finished_run, open_run_data
from deeplabzoo.publishing.upload import open_repository
from deeplabzoo.publishing.weights import Precision, require_same_answer, write_weights
from deeplabzoo.say import say
from deeplabzoo.train.splits import Splits
from deeplabzoo.zoo.checksum import sha256_of
from deeplabzoo.zoo.factory import load
from deeplabzoo.zoo.manifest import License
from deeplabzoo.zoo.measured import manifest_json

_NAME, _TAG = re.compile(r"[a-z0-9]+(_[a-z0-9]+)+"), re.compile(r"[a-z0-9]+([_-][a-z0-9]+)*")
_OWN_LICENSE = "Apache-2.0"
_NOT_STATED = "not stated"


@dataclass(frozen=True, kw_only=True)
class Order:
    """What is to be published, and where to; the command's options."""

    run: Path
    data: Path | None
    tag: str
    name: str | None
    precision: Precision
    chosen: Chosen
    out: Path
    photo: Path | None
    data_license: str | None
    license: str
    manifest: Path | None
    default: bool
    hub: str | None
    device: str


def publish(order: Order) -> str:
    """Publish a run and return what was made, in one line.

    All that can be refused is refused before the first picture is measured. The release folder appears whole, after an upload
    has succeeded; the manifest lists the weights last. Raises one of deeplabzoo's errors, and then the folder is as before.
    """
    require_replaceable(order.out, order.run)
    run = finished_run(order.run, order.chosen)
    name, first = _name(order, run)
    terms = _license(order, run)
    data = open_run_data(run, order.data)
    photo = small_photo(order.photo) if order.photo else None
    if order.hub:
        open_repository(order.hub)
    with staged(order.out) as folder:
        release = _write_release(order, run, data, name, terms, folder)
        shown = photo if photo is not None or data is None else small_photo(data.val[0].image)
        _write_card(release, run, shown, folder)
        public = photo is not None or run.recipe.data == "shapes"  # pictures of a data set are not ours to pass on
        commit = to_hub(order.hub, release, folder, overlay=public) if order.hub else None
        row = _write_row(order, release, commit, folder, default=order.default or first)
    if order.manifest and row is not None:
        beside_manifest(order.manifest, release, order.out, row, overlay=public)
    return f"{release.full_name}: {release.told}; {order.out}"


def _name(order: Order, run: FinishedRun) -> tuple[str, bool]:
    """Return the release's name, and whether the manifest has no weights of it yet; raises UsageError."""
    words = (run.net.config.architecture, short_name(run.net.config.encoder), run.class_list)
    expected = "_".join(filter(None, words))
    name = order.name or expected
    if not _NAME.fullmatch(name) or not _TAG.fullmatch(order.tag):
        raise UsageError(
            f"--name and --tag are small letters, digits and underscores, such as {expected} and v1, not '{name}' and "
            f"'{order.tag}'."
        )
    if order.manifest is None:
        return name, True
    require_known_classes(run.class_list, run.net.classes)
    bundle.require_name_of(name, expected)
    return name, bundle.require_new(order.manifest, name, order.tag)


def _license(order: Order, run: FinishedRun) -> License:
    generated = "none: generated pictures" if run.recipe.data == "shapes" else None
    terms = order.data_license or generated
    if terms is None and (order.manifest or order.hub):
        raise UsageError(
            "Say under which terms the training pictures are, with --data-license TEXT, before others get the weights."
        )
    return License(code=_OWN_LICENSE, weights=order.license, data=terms or _NOT_STATED)


def _write_release(order: Order, run: FinishedRun, data: Splits | None, name: str, terms: License, folder: Path) -> Release:
    """Write weights, golden logits and reports; what is measured is the file just written."""
    full_name = f"{name}.{order.tag}"
    file = folder / f"{full_name}.safetensors"
    trained = run.net.weights_source.get("trained", {})
    write_weights(run.net, file, order.precision, {"name": name, "tag": order.tag, **trained, "chosen": order.chosen})
    if order.manifest:
        bundle.require_small(file)
    net = load(file)
    golden = folder / f"{full_name}.golden.safetensors"
    save_golden(net, golden)
    require_same_answer(golden_difference(run.net, golden), order.precision)
    address = full_name if order.manifest else f"hf-hub:{order.hub}" if order.hub else file.name
    reports = measured(net, run, data, order.device, address) if data else []
    for report in reports:
        _write(folder / report_name(full_name, report), report.to_json())
    release = Release(
        name=name,
        tag=order.tag,
        data=run.class_list,
        file=file.name,
        bytes=file.stat().st_size,
        sha256=sha256_of(file),
        net=net,
        training=training_of(run, data),
        recipe=recipe_without_paths(run.recipe),
        reports=reports,
        license=terms,
        address=address,
    )
    _write(folder / FACTS, manifest_json(facts_of(release)))
    return release


def _write_card(release: Release, run: FinishedRun, photo: Pixels | None, folder: Path) -> None:
    curves = copy_curves(run.folder / CURVES, folder / CURVES)
    if photo is not None:
        draw_overlay(release.net, photo, folder / OVERLAY)
    _write(folder / CARD, card(release, curves=CURVES if curves else None, overlay=OVERLAY if photo is not None else None))


def _write_row(order: Order, release: Release, commit: str | None, folder: Path, *, default: bool) -> dict[str, Any] | None:
    """Write row.json; for classes of somebody's own there is none, which is said, and refused where a manifest needs it."""
    if release.data is None and not order.manifest:
        say("row: none, as a manifest lists weights of known class lists only; config.json holds the same facts")
        return None
    bundled = {"kind": "bundled", "file": release.file}
    on_hub = {"kind": "hub", "repo": order.hub, "revision": commit, "file": WEIGHTS_ON_HUB}
    source = on_hub if commit and not order.manifest else bundled
    row = row_of(release, source, default=default, reports=REPORTS if order.manifest else "")
    _write(folder / ROW, manifest_json(row))
    return row


def _write(path: Path, text: str) -> None:
    write_atomically(path, lambda file: file.write(text.encode()))
