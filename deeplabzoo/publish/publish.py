"""Publishing a finished run: check, write, read back, evaluate, describe, and copy to a manifest or the Hub."""

import dataclasses
import json
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deeplabzoo.data.image_io import Pixels
from deeplabzoo.errors import DeepLabZooError, UsageError
from deeplabzoo.evaluation.reproduce import golden_difference, save_golden
from deeplabzoo.files import ensure_folder, remove_partial_files, write_atomically
from deeplabzoo.hub.factory import load
from deeplabzoo.hub.http_download import sha256_of
from deeplabzoo.hub.manifest import License, Manifest, read_manifest, released_rows
from deeplabzoo.log import logger
from deeplabzoo.models.encoder_table import short_name
from deeplabzoo.publish.manifest_row import (
    REPORTS,
    manifest_json,
    recipe_without_paths,
    release_config,
    release_row,
    require_known_classes,
    training_record,
)
from deeplabzoo.publish.model_card import copy_curves, draw_overlay, read_thumbnail, release_card
from deeplabzoo.publish.push_to_hub import create_repository, upload
from deeplabzoo.publish.release import (
    CARD,
    CURVES,
    FACTS,
    OVERLAY,
    ROW,
    WEIGHTS_ON_HUB,
    Chosen,
    FinishedRun,
    Precision,
    Release,
    evaluate_splits,
    load_finished_run,
    open_run_data,
    report_name,
    require_logits_parity,
    require_replaceable,
    staged_folder,
    write_weights,
)
from deeplabzoo.strict_json import decode_dataclass
from deeplabzoo.training.dataloader import Splits

MAX_BUNDLED_BYTES = 7_000_000
"""Largest weights file that ships with the package."""


def require_new(manifest: Path, name: str, tag: str) -> bool:
    """Return whether `name` has no checkpoint yet; raises UsageError if the manifest is missing or lists `name.tag`."""
    if not manifest.is_file():
        raise UsageError(f"There is no manifest '{manifest}'; give the path of weights/manifest.json.")
    tags = [row.tag for row in read_manifest(manifest) if row.name == name]
    if tag in tags:
        raise UsageError(
            f"{name}.{tag} is already released, and a checkpoint is never replaced under its tag; choose another --tag."
        )
    return not tags


def require_matching_name(name: str, expected: str) -> None:
    """Raise UsageError unless `name` is the registry name of these weights."""
    if name != expected:
        raise UsageError(f"A name in the manifest is architecture_encoder_data; these weights are {expected}, not {name}.")


def require_small(file: Path) -> None:
    """Raise UsageError for a file that is too large to ship with the package."""
    size = file.stat().st_size
    if size > MAX_BUNDLED_BYTES:
        raise UsageError(
            f"The weights file has {size / 1e6:.1f} MB; the package ships at most {MAX_BUNDLED_BYTES / 1e6:.0f} MB per file: "
            "publish fp16, or publish on the Hub with --hub."
        )


def add_to_manifest(manifest: Path, row: Mapping[str, Any], files: Mapping[str, bytes], reports: Mapping[str, str]) -> None:
    """Write `files` beside the manifest, `reports` into the project's evaluations, then the row.

    A default row replaces the former default. On UsageError, WeightsError or OutputError the files it wrote are removed again.
    """
    folder, evaluations = manifest.parent, manifest.resolve().parents[1] / REPORTS
    contents = {folder / name: content for name, content in files.items()}
    if reports:
        ensure_folder(evaluations)
        contents |= {evaluations / name: text.encode() for name, text in reports.items()}
    for path in (*contents, manifest):
        remove_partial_files(path)  # left by a killed process; this folder is shipped
    written = [path for path in contents if not path.exists()]
    try:
        for path, content in contents.items():
            _write_text(path, content)
        require_new(manifest, row["name"], row["tag"])
        plain = json.loads(manifest.read_text(encoding="utf-8"))  # read again: another process may have added rows
        for other in plain["rows"]:
            if row["default"] and other["name"] == row["name"]:
                other["default"] = False
        plain["rows"].append(dict(row))
        decode_dataclass(Manifest, plain, manifest.name)
        _write_text(manifest, manifest_json(plain).encode())
    except DeepLabZooError:
        for path in written:
            path.unlink(missing_ok=True)
        raise


def _write_text(path: Path, content: bytes) -> None:
    write_atomically(path, lambda file: file.write(content))


def upload_release(repo: str, release: Release, folder: Path, *, overlay: bool) -> str:
    """Upload the release under the Hub's file names; returns the commit."""
    with tempfile.TemporaryDirectory() as name:
        there = Path(name)
        shutil.copyfile(folder / release.file, there / WEIGHTS_ON_HUB)
        shutil.copyfile(folder / f"{release.full_name}.golden.safetensors", there / "golden.safetensors")
        wanted = [
            FACTS,
            CURVES,
            *([OVERLAY] if overlay else []),
            *(report_name(release.full_name, one) for one in release.reports),
        ]
        present = [one for one in wanted if (folder / one).is_file()]
        for one in present:
            shutil.copyfile(folder / one, there / one)
        named = dataclasses.replace(release, address=f"hf-hub:{repo}")
        (there / CARD).write_text(release_card(named, **_image_names(present)), encoding="utf-8")
        commit = upload(repo, there, f"{release.full_name}: {release.metrics_summary}")
    logger.info(f"hub: hf-hub:{repo}@{commit[:12]}")
    return commit


def add_release_to_manifest(manifest: Path, release: Release, folder: Path, row: Mapping[str, Any], *, overlay: bool) -> None:
    """Copy the release into the manifest's folder; each file name begins with the release's name."""
    full_name = release.full_name
    files = {name: (folder / name).read_bytes() for name in (f"{full_name}.safetensors", f"{full_name}.golden.safetensors")}
    images = [one for one in (CURVES, *([OVERLAY] if overlay else [])) if (folder / one).is_file()]
    files |= {f"{full_name}.{one}": (folder / one).read_bytes() for one in images}
    files[f"{full_name}.md"] = release_card(release, **_image_names(images, f"{full_name}.")).encode()
    reports = {report_name(full_name, one): one.to_json() for one in release.reports}
    add_to_manifest(manifest, row, files, reports)
    logger.info(f"manifest: {full_name} added{' as the default' if row['default'] else ''}")


def _image_names(present: Sequence[str], prefix: str = "") -> dict[str, str | None]:
    return {
        "curves": f"{prefix}{CURVES}" if CURVES in present else None,
        "overlay": f"{prefix}{OVERLAY}" if OVERLAY in present else None,
    }


_NAME, _TAG = re.compile(r"[a-z0-9]+(_[a-z0-9]+)+"), re.compile(r"[a-z0-9]+([_-][a-z0-9]+)*")
_OWN_LICENSE = "Apache-2.0"
_NOT_STATED = "not stated"


@dataclass(frozen=True, kw_only=True)
class PublishConfig:
    """What is published, and where to; the command's options."""

    run: Path
    data: Path | None
    tag: str
    name: str | None
    precision: Precision
    chosen: Chosen
    out: Path
    image: Path | None
    data_license: str | None
    license: str
    manifest: Path | None
    default: bool
    hub: str | None
    device: str


def publish(config: PublishConfig) -> str:
    """Publish a run and return a one-line summary.

    Everything is checked before the evaluation starts. The release folder appears complete, after a successful upload; the
    manifest is written last. On an error the folder is as before.

    Args:
        config: What is published, and where to.

    Raises:
        UsageError: Invalid options, or a name and tag that are already released.
        TrainingError: The run is not finished.
        DeepLabZooError: Any other failure, as one sentence.
    """
    require_replaceable(config.out, config.run)
    run = load_finished_run(config.run, config.chosen)
    name, first = _name(config, run)
    terms = _license(config, run)
    data = open_run_data(run, config.data)
    image = read_thumbnail(config.image) if config.image else None
    if config.hub:
        create_repository(config.hub)
    with staged_folder(config.out) as folder:
        release = _write_release(config, run, data, name, terms, folder)
        shown = image if image is not None or data is None else read_thumbnail(data.val[0].image)
        _write_card(release, run, shown, folder)
        public = image is not None or run.recipe.data == "shapes"  # images of a dataset may not be redistributed
        commit = upload_release(config.hub, release, folder, overlay=public) if config.hub else None
        row = _write_row(config, release, commit, folder, default=config.default or first)
    if config.manifest and row is not None:
        add_release_to_manifest(config.manifest, release, config.out, row, overlay=public)
    return f"{release.full_name}: {release.metrics_summary}; {config.out}"


def _name(config: PublishConfig, run: FinishedRun) -> tuple[str, bool]:
    """Return the release's name, and whether the manifest has no checkpoint of it yet; raises UsageError."""
    parts = (run.net.config.architecture, short_name(run.net.config.encoder), run.class_list)
    expected = "_".join(filter(None, parts))
    name = config.name or expected
    if not _NAME.fullmatch(name) or not _TAG.fullmatch(config.tag):
        raise UsageError(
            f"--name and --tag are lower-case letters, digits and underscores, such as {expected} and v1, not '{name}' and "
            f"'{config.tag}'."
        )
    if config.manifest is None:
        if config.tag in (row.tag for row in released_rows(name)):
            raise UsageError(f"{name}.{config.tag} is a released checkpoint of deeplabzoo; choose another --name or --tag.")
        return name, True
    require_known_classes(run.class_list, run.net.classes)
    require_matching_name(name, expected)
    return name, require_new(config.manifest, name, config.tag)


def _license(config: PublishConfig, run: FinishedRun) -> License:
    generated = "none: generated images" if run.recipe.data == "shapes" else None
    terms = config.data_license or generated
    if terms is None and (config.manifest or config.hub):
        raise UsageError(
            "State the licence of the training images with --data-license TEXT before the weights are distributed."
        )
    return License(code=_OWN_LICENSE, weights=config.license, data=terms or _NOT_STATED)


def _write_release(
    config: PublishConfig, run: FinishedRun, data: Splits | None, name: str, terms: License, folder: Path
) -> Release:
    """Write weights, golden logits and reports; the file just written is what is evaluated."""
    full_name = f"{name}.{config.tag}"
    file = folder / f"{full_name}.safetensors"
    trained = run.net.weights_source.get("trained", {})
    write_weights(run.net, file, config.precision, {"name": name, "tag": config.tag, **trained, "chosen": config.chosen})
    if config.manifest:
        require_small(file)
    net = load(file)
    golden = folder / f"{full_name}.golden.safetensors"
    save_golden(net, golden)
    require_logits_parity(golden_difference(run.net, golden), config.precision)
    address = full_name if config.manifest else f"hf-hub:{config.hub}" if config.hub else file.name
    reports = evaluate_splits(net, run, data, config.device, address) if data else []
    for report in reports:
        _write(folder / report_name(full_name, report), report.to_json())
    release = Release(
        name=name,
        tag=config.tag,
        data=run.class_list,
        file=file.name,
        bytes=file.stat().st_size,
        sha256=sha256_of(file),
        net=net,
        training=training_record(run, data),
        recipe=recipe_without_paths(run.recipe),
        reports=reports,
        license=terms,
        address=address,
    )
    _write(folder / FACTS, manifest_json(release_config(release)))
    return release


def _write_card(release: Release, run: FinishedRun, image: Pixels | None, folder: Path) -> None:
    curves = copy_curves(run.folder / CURVES, folder / CURVES)
    if image is not None:
        draw_overlay(release.net, image, folder / OVERLAY)
    _write(
        folder / CARD,
        release_card(release, curves=CURVES if curves else None, overlay=OVERLAY if image is not None else None),
    )


def _write_row(
    config: PublishConfig, release: Release, commit: str | None, folder: Path, *, default: bool
) -> dict[str, Any] | None:
    """Write row.json and return the row; None for classes of no known class list, which manifests cannot hold."""
    if release.data is None and not config.manifest:
        logger.info("row.json not written: manifests hold known class lists only; config.json has the same facts")
        return None
    bundled = {"kind": "bundled", "file": release.file}
    on_hub = {"kind": "hub", "repo": config.hub, "revision": commit, "file": WEIGHTS_ON_HUB}
    source = on_hub if commit and not config.manifest else bundled
    row = release_row(release, source, default=default, reports=REPORTS if config.manifest else "")
    _write(folder / ROW, manifest_json(row))
    return row


def _write(path: Path, text: str) -> None:
    write_atomically(path, lambda file: file.write(text.encode()))
