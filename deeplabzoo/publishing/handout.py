"""A release handed out: its files under the names that they have beside a manifest, and on the Hub."""

import dataclasses
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from deeplabzoo.publishing import bundle
from deeplabzoo.publishing.card import card
from deeplabzoo.publishing.measure import report_name
from deeplabzoo.publishing.release import CARD, CURVES, FACTS, OVERLAY, WEIGHTS_ON_HUB, Release
from deeplabzoo.publishing.upload import upload
from deeplabzoo.say import say


def to_hub(repo: str, release: Release, folder: Path, *, overlay: bool) -> str:
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
        (there / CARD).write_text(card(named, **_pictures(present)), encoding="utf-8")
        commit = upload(repo, there, f"{release.full_name}: {release.told}")
    say(f"hub: hf-hub:{repo}@{commit[:12]}")
    return commit


def beside_manifest(manifest: Path, release: Release, folder: Path, row: Mapping[str, Any], *, overlay: bool) -> None:
    """Put the release beside the manifest under names that begin with its own."""
    full_name = release.full_name
    files = {name: (folder / name).read_bytes() for name in (f"{full_name}.safetensors", f"{full_name}.golden.safetensors")}
    pictures = [one for one in (CURVES, *([OVERLAY] if overlay else [])) if (folder / one).is_file()]
    files |= {f"{full_name}.{one}": (folder / one).read_bytes() for one in pictures}
    files[f"{full_name}.md"] = card(release, **_pictures(pictures, f"{full_name}.")).encode()
    reports = {report_name(full_name, one): one.to_json() for one in release.reports}
    bundle.add_to_manifest(manifest, row, files, reports)
    say(f"manifest: {full_name} added{' as the default' if row['default'] else ''}")


def _pictures(present: Sequence[str], prefix: str = "") -> dict[str, str | None]:
    return {
        "curves": f"{prefix}{CURVES}" if CURVES in present else None,
        "overlay": f"{prefix}{OVERLAY}" if OVERLAY in present else None,
    }
