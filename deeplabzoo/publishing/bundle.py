"""A release put beside a manifest: its files, its reports, and the row that lists them, the row last."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deeplabzoo.errors import DeepLabZooError, UsageError
from deeplabzoo.models.strict import read_plain
from deeplabzoo.output import ensure_folder, remove_unfinished, write_atomically
from deeplabzoo.publishing.row import REPORTS
from deeplabzoo.zoo.manifest import Manifest, read_manifest
from deeplabzoo.zoo.measured import manifest_json

LARGEST_BYTES = 7_000_000
"""Of a file that every installation carries."""


def require_new(manifest: Path, name: str, tag: str) -> bool:
    """Return whether `name` has no weights yet; raises UsageError where the manifest is missing or lists `name.tag` already."""
    if not manifest.is_file():
        raise UsageError(f"There is no manifest '{manifest}'; give the path of weights/manifest.json.")
    tags = [row.tag for row in read_manifest(manifest) if row.name == name]
    if tag in tags:
        raise UsageError(
            f"{name}.{tag} is released already, and a weight is never replaced under its tag; choose another --tag."
        )
    return not tags


def require_name_of(name: str, expected: str) -> None:
    """Raise UsageError unless `name` says what the weights are, as names of the registry do."""
    if name != expected:
        raise UsageError(
            f"A name in the manifest says architecture, encoder and data; these weights are {expected}, not {name}."
        )


def require_small(file: Path) -> None:
    """Raise UsageError for a file that is too large to ship with the package."""
    size = file.stat().st_size
    if size > LARGEST_BYTES:
        raise UsageError(
            f"The weights take {size / 1e6:.1f} MB; what ships with the package has at most {LARGEST_BYTES / 1e6:.0f} MB: "
            "publish fp16, or publish on the Hub with --hub."
        )


def add_to_manifest(manifest: Path, row: Mapping[str, Any], files: Mapping[str, bytes], reports: Mapping[str, str]) -> None:
    """Write `files` beside the manifest, `reports` into the project's evaluations, then the row.

    A row that is the default takes that from the row which had it. Raises UsageError, WeightsError or OutputError, and then
    takes back what it wrote: nothing is listed whose file is missing.
    """
    folder, evaluations = manifest.parent, manifest.resolve().parents[1] / REPORTS
    contents = {folder / name: content for name, content in files.items()}
    if reports:
        ensure_folder(evaluations)
        contents |= {evaluations / name: text.encode() for name, text in reports.items()}
    for path in (*contents, manifest):
        remove_unfinished(path)  # of a process that was killed here; this folder is shipped
    written = [path for path in contents if not path.exists()]
    try:
        for path, content in contents.items():
            _write(path, content)
        require_new(manifest, row["name"], row["tag"])
        plain = json.loads(manifest.read_text(encoding="utf-8"))  # only now: others may have added rows since
        for other in plain["rows"]:
            if row["default"] and other["name"] == row["name"]:
                other["default"] = False
        plain["rows"].append(dict(row))
        read_plain(Manifest, plain, manifest.name)
        _write(manifest, manifest_json(plain).encode())
    except DeepLabZooError:
        for path in written:
            path.unlink(missing_ok=True)
        raise


def _write(path: Path, content: bytes) -> None:
    write_atomically(path, lambda file: file.write(content))
