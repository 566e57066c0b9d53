"""The manifest row of a release, and the file of facts that travels with weights which no manifest lists."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from deeplabzoo.errors import UsageError
from deeplabzoo.models.checkpoint import FORMAT
from deeplabzoo.models.config import DeepLabConfig
from deeplabzoo.models.deeplab import DeepLab
from deeplabzoo.models.strict import read_plain
from deeplabzoo.publishing.measure import report_name
from deeplabzoo.publishing.release import Release
from deeplabzoo.zoo.manifest import WeightRow
from deeplabzoo.zoo.measured import figures, per_class

REPORTS = "benchmarks/evaluations"
"""Where evaluation reports are kept in the project."""
_ALWAYS = ("architecture", "encoder", "num_classes", "output_stride")


def row_of(release: Release, source: Mapping[str, Any], *, default: bool, reports: str = "") -> dict[str, Any]:
    """Return the row as plain values, checked as the manifest checks it; `reports` is the folder that the reports go to.

    Raises UsageError for classes that no class list has, WeightsError for a row that the manifest would refuse.
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
        "metrics": metrics_of(release, reports),
        "license": dataclasses.asdict(release.license),
        "verified": "measured here" if release.reports else "layout only",
        "notes": f"{started} Weights of {chosen}.",
        "training": dataclasses.asdict(release.training),
    }
    plain: dict[str, Any] = _plain(row)
    read_plain(WeightRow, plain, release.full_name)
    return plain


def require_known_classes(data: str | None, classes: Sequence[str]) -> None:
    """Raise UsageError for weights whose classes are those of no class list (`data` None): no manifest can list them."""
    if data is None:
        shown = ", ".join(classes[:4]) + (" …" if len(classes) > 4 else "")
        raise UsageError(
            f"The {len(classes)} classes of these weights ({shown}) are those of no class list of deeplabzoo, so a manifest "
            "cannot list them; leave --manifest out, and use the release folder or --hub."
        )


def metrics_of(release: Release, reports: str = "") -> list[dict[str, Any]]:
    """Return the figures of all reports; the first one, mIoU on val, also by class."""
    found = []
    for report in release.reports:
        place = f"{reports}/{report_name(release.full_name, report)}" if reports else None
        found += figures(report.to_dict(), place)
    if found:
        found[0]["per_class"] = per_class(release.reports[0].to_dict())
    return found


def facts_of(release: Release) -> dict[str, Any]:
    """Return config.json: network, classes, training and figures, whether or not a manifest row could hold them."""
    facts: dict[str, Any] = {
        "library_name": FORMAT,
        "name": release.full_name,
        "sha256": release.sha256,
        **network_facts(release.net),
        "metrics": metrics_of(release),
        "license": dataclasses.asdict(release.license),
        "training": dataclasses.asdict(release.training),
        "recipe": dict(release.recipe),
    }
    plain: dict[str, Any] = _plain(facts)
    return plain


def network_facts(net: DeepLab) -> dict[str, Any]:
    """Return what config.json says of any network: its configuration, classes, colours and input."""
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
    """Return what is not a default, and the four fields that everybody wants to read."""
    usual = DeepLabConfig(architecture=config.architecture, encoder=config.encoder).to_dict()
    return {key: value for key, value in config.to_dict().items() if key in _ALWAYS or value != usual[key]}


def _plain(value: Any) -> Any:
    """Turn tuples into lists, as reading the JSON back would."""
    if isinstance(value, Mapping):
        return {key: _plain(one) for key, one in value.items()}
    return [_plain(one) for one in value] if isinstance(value, list | tuple) else value
