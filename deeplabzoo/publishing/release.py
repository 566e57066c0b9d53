"""One release: everything that its files tell, and the folder that appears whole or not at all."""

import glob
import json
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from deeplabzoo.errors import OutputError, UsageError
from deeplabzoo.inference.report import Report
from deeplabzoo.models.deeplab import DeepLab
from deeplabzoo.output import ensure_folder
from deeplabzoo.zoo.manifest import License
from deeplabzoo.zoo.training import Training

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
    def told(self) -> str:
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
    foreign = _foreign(out)
    if foreign:
        raise UsageError(f"--out '{out}' holds something that is not of a release ({foreign[0]}); name another folder.")


def _foreign(out: Path) -> list[str]:
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


def _clear_up(out: Path) -> None:
    mark = f".{glob.escape(out.name)}.{'?' * 8}"
    for before in out.parent.glob(f"{mark}.before"):
        if not out.exists():
            before.rename(out)
    for leftover in (*out.parent.glob(f"{mark}.part"), *out.parent.glob(f"{mark}.before")):
        shutil.rmtree(leftover, ignore_errors=True)


@contextmanager
def staged(out: Path) -> Iterator[Path]:
    """Give an empty folder beside `out` that takes its place when the block ends, and vanishes if the block fails.

    What a process that was killed here left behind is removed, and a release that it had put aside is put back. Raises
    OutputError where folders cannot be made or renamed; the release that was there then still is.
    """
    ensure_folder(out.parent)
    mark = secrets.token_hex(4)
    partial, before = (out.with_name(f".{out.name}.{mark}.{word}") for word in ("part", "before"))
    try:
        _clear_up(out)
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
