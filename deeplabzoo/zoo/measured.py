"""Figures measured here, put into the manifest from evaluation reports: only those of the very file that a row releases."""

import json
import re
import shlex
from collections.abc import Mapping
from typing import Any

from deeplabzoo.errors import UsageError
from deeplabzoo.models.strict import read_plain
from deeplabzoo.zoo.manifest import Manifest

FIGURES = {"mIoU": "miou", "pixel accuracy": "pixel_accuracy"}
"""Name in the manifest -> field of a report, 0...1."""
_SAME_CONDITIONS = ("name", "protocol", "data", "split", "images", "output_stride", "scales", "flip", "origin")


def record(manifest_text: str, report: Mapping[str, Any], place: str | None = None) -> tuple[str, str]:
    """Return the manifest's new text with a report's figures in the row of its weights, and a line that says so.

    `place` is where the report itself is kept, for readers of the row.

    A figure under the same conditions is replaced, any other is kept. Raises UsageError for a report of a file that is not
    released (by its sha256), of an adapted network, or of a part of a split; and WeightsError if the result would be invalid.
    """
    plain = json.loads(manifest_text)
    try:
        row = _row_of(report, plain["rows"])
        metrics = figures(report, place)
    except (KeyError, TypeError) as error:
        raise UsageError(f"This is not a report of `evaluate --json`: it lacks {error}.") from None
    new = [{key: one[key] for key in _SAME_CONDITIONS} for one in metrics]
    kept = [one for one in row["metrics"] if {key: one.get(key) for key in _SAME_CONDITIONS} not in new]
    if any(one.get("per_class") for one in row["metrics"] if one not in kept):
        metrics[0]["per_class"] = per_class(report)  # the mIoU that it is beside was measured again, and so were they
    row["metrics"] = [*kept, *metrics]
    row["verified"] = "measured here"
    read_plain(Manifest, plain, "manifest.json")
    values = ", ".join(f"{one['name']} {one['value']} %" for one in metrics)
    pictures = report["subset"] or f"{report['images']} images"
    line = f"{row['name']}.{row['tag']}: {values} on {report['data']} {report['split']} ({pictures}) recorded"
    return manifest_json(plain), line


def manifest_json(plain: Mapping[str, Any]) -> str:
    """Return a manifest as text in its one form: two spaces of indent, short lists of values on one line."""
    text = json.dumps(plain, indent=2, ensure_ascii=False)
    # a line feed never stands inside a JSON string, so only the brackets of lists are met here
    return re.sub(r"\[\n\s*([^\[\]{}]*?)\n\s*\]", lambda found: f"[{_one_line(found[1])}]", text) + "\n"


def _one_line(values: str) -> str:
    return re.sub(r",\n\s*", ", ", values)


def _row_of(report: Mapping[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
    weights = report["weights"]
    sha256, tag = weights["sha256"], weights.get("tag")
    if not sha256:
        raise UsageError("The report does not say which file was evaluated (no sha256), so it belongs to no released weights.")
    if weights.get("adapted"):
        raise UsageError(f"The report is of an adapted network ({'; '.join(weights['adapted'])}), not of the released weights.")
    if report["limit"]:
        raise UsageError(f"The report covers a part of the split only ({report['subset']}); evaluate without --limit.")
    for row in rows:
        named = tag is not None and report["model"] in (row["name"], f"{row['name']}.{tag}") and tag == row["tag"]
        published = row["sha256"] or row["sha256_prefix"]
        if (sha256.startswith(published) and (row["sha256"] or named)) if published else named:
            return row
        if named:
            raise UsageError(
                f"The report of {row['name']}.{tag} is of a file with sha256 {sha256[:12]}…, released is {published[:12]}…."
            )
    raise UsageError(f"No released weights have the sha256 {sha256[:12]}… of this report ({report['model']}).")


def per_class(report: Mapping[str, Any]) -> dict[str, float | None]:
    """Return a report's IoU by class in %, as a row's mIoU keeps it; None for absent classes."""
    return {name: None if value is None else round(100 * value, 2) for name, value in report["per_class"].items()}


def figures(report: Mapping[str, Any], place: str | None = None) -> list[dict[str, Any]]:
    """Return the metrics that a row gets from a report, mIoU first; `place` is where the report is kept.

    Raises UsageError for a report that does not say which command made it, KeyError for something else than a report.
    """
    settings, hardware = report["protocol_settings"], report["hardware"]
    conditions = {
        "unit": "%",
        "protocol": report["protocol"],
        "data": report["data"],
        "split": report["split"],
        "images": report["images"],
        "subset": report["subset"],
        "image_list_sha256": report["image_list_sha256"],
        "output_stride": settings["output_stride"],
        "scales": list(settings["scales"]),
        "flip": settings["flip"],
        "origin": "measured",
        "command": _command(report["command"]),
        "date": report["date"][:10],
        "hardware": str(hardware.get("gpu") or hardware.get("cpu") or hardware.get("device")),
    }
    if place:
        conditions["report"] = place
    return [{"name": name, "value": round(100 * report[field], 2), **conditions} for name, field in FIGURES.items()]


def _command(command: str | None) -> str:
    """Return the command without what is of one machine alone: where the data lay, and where the report went."""
    if not command:
        raise UsageError(
            "The report does not say which command made it; make it with `python -m deeplabzoo.evaluate … --json`."
        )
    words: list[str] = []
    given = iter(shlex.split(command))
    for word in given:
        option, _, value = word.partition("=")
        if option == "--json":
            value or next(given, "")
        elif option == "--root":
            value or next(given, "")
            words += ["--root", "DIR"]
        else:
            words.append(word.rpartition("/")[2] if word.startswith(("/", "~", ".")) else word)
    return shlex.join(words)
