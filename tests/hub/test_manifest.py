"""The manifest says what is released, in types: what it cannot mean is refused with its place and a reason."""

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from deeplabzoo.errors import WeightsError
from deeplabzoo.hub import manifest
from deeplabzoo.hub.manifest import read_manifest, released
from deeplabzoo.strict_json import decode_dataclass

FOLDER = manifest.weights_folder()
SCHEMA = json.loads((FOLDER / "manifest.schema.json").read_text())
PLAIN = json.loads((FOLDER / "manifest.json").read_text())

METRIC = {
    "name": "mIoU",
    "value": 72.4,
    "unit": "%",
    "protocol": "original resolution, union > 0",
    "data": "voc",
    "split": "val",
    "images": 173,
    "output_stride": 16,
    "scales": [1.0],
    "flip": False,
    "origin": "measured",
    "command": "python -m deeplabzoo.evaluate ...",
    "date": "2026-11-21",
}

PUBLISHED = {key: value for key, value in METRIC.items() if key not in ("command", "date")} | {"origin": "published"}

TRAINING = {
    "recipe": "deeplabv3plus_mobilenetv2_voc",
    "recipe_sha256": "a" * 64,
    "overrides": ["lr=0.01"],
    "commit": None,
    "seed": 0,
    "steps": 100,
    "step": 80,
    "epochs": 2.5,
    "data": "voc",
    "split": "train",
    "images": 330,
    "split_sha256": "b" * 64,
    "initial_weights": "deeplabv3_mobilenetv2_voc.coral",
    "chosen": "best",
    "hours": 1.5,
    "hardware": "Some CPU, 1 threads",
    "torch": "2.6.0",
    "date": "2026-11-21",
}


def first_row(**changes: Any) -> dict[str, Any]:
    return {**copy.deepcopy(PLAIN["rows"][0]), **changes}


def with_rows(*rows: dict[str, Any]) -> dict[str, Any]:
    return {"schema": 1, "rows": list(rows)}


def changed(path: str, value: Any) -> dict[str, Any]:
    """The first row with one value replaced, by a dotted path."""
    row = first_row(metrics=[dict(METRIC)])
    *folders, last = path.split(".")
    place: Any = row
    for folder in folders:
        place = place[int(folder)] if isinstance(place, list) else place[folder]
    place[last] = value
    return with_rows(row)


def without(path: str) -> dict[str, Any]:
    plain = changed(path, None)
    *folders, last = path.split(".")
    place: Any = plain["rows"][0]
    for folder in folders:
        place = place[int(folder)] if isinstance(place, list) else place[folder]
    del place[last]
    return plain


def test_the_released_manifest_satisfies_its_schema() -> None:
    """Whoever reads the file with other tools can rely on the schema beside it."""
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    jsonschema.validate(PLAIN, SCHEMA)
    assert len(released().rows) == len(PLAIN["rows"]) >= 1


@pytest.mark.parametrize("name", sorted(SCHEMA["$defs"].keys() - {"RelativeFile"}))
def test_schema_and_types_name_the_same_fields(name: str) -> None:
    """A field added in one place alone would be refused by the other."""
    fields = dataclasses.fields(getattr(manifest, name))
    definition = SCHEMA["$defs"][name]
    assert set(definition["properties"]) == {field.name for field in fields}
    required = {field.name for field in fields if field.default is dataclasses.MISSING}
    assert set(definition.get("required", ())) == required
    assert definition["additionalProperties"] is False


def test_schema_and_types_agree_that_a_full_row_is_right() -> None:
    plain = changed("metrics.0.value", 70)
    jsonschema.validate(plain, SCHEMA)
    assert decode_dataclass(manifest.Manifest, plain, "m").rows[0].metrics[0].value == 70.0


@pytest.mark.parametrize(
    ("path", "value"),
    [
        *(("metrics.0.value", value) for value in (0, 0.1, 99.9, 100)),
        *(("metrics.0.per_class", {"cat": value}) for value in (0, 0.1, 99.9, 100)),
        ("bytes", 1),
        ("metrics", [METRIC, PUBLISHED]),
    ],
)
def test_values_at_the_edge_are_right(path: str, value: Any) -> None:
    """A class that is never found has 0 %, and a published figure needs no command."""
    plain = changed(path, value)
    jsonschema.validate(plain, SCHEMA)
    decode_dataclass(manifest.Manifest, plain, "m")


@pytest.mark.parametrize("name", ["Manifest", *sorted(SCHEMA["$defs"].keys() - {"RelativeFile"})])
def test_rows_cannot_be_changed(name: str) -> None:
    """They are shared by all callers; what has many fields is built by their names alone."""
    kind = getattr(manifest, name)
    assert kind.__dataclass_params__.frozen
    by_name = {field.kw_only for field in dataclasses.fields(kind)}
    assert by_name == {name in ("Metric", "License", "Training", "WeightRow")} or kind.__module__ != manifest.__name__


def test_the_manifest_of_an_installation_is_read_once() -> None:
    """Every `create` asks for it."""
    assert released() is released()
    assert manifest.weights_folder() is FOLDER


def test_a_source_is_named_in_brief() -> None:
    """Twelve digits tell commits apart, as git shows them."""
    source = manifest.HubSource("hub", "owner/name", "0123456789abcdef" * 2, "a/b.safetensors")
    assert str(source) == "hf-hub:owner/name@0123456789ab/a/b.safetensors"


WRONG = {
    "unknown field": (changed("colour", "red"), "unknown field 'colour'"),
    "misspelt field": (changed("config.num_class", 21), "Did you mean 'num_classes'"),
    "missing field": (without("license.data"), "lacks the field 'data'"),
    "text for a number": (changed("bytes", "2193224"), r"rows\[0\].bytes must be a whole number, not '2193224'"),
    "boolean for a number": (changed("bytes", True), "must be a whole number"),
    "number for a boolean": (changed("default", 1), "true or false"),
    "no bytes at all": (changed("bytes", 0), "at least 1"),
    "short hash": (changed("sha256", "350af47f"), "sha256 must match"),
    "upper-case hash": (changed("sha256", "A" * 64), "sha256 must match"),
    "short prefix": (changed("sha256_prefix", "350af47"), "sha256_prefix must match"),
    "unknown source": (changed("source", {"kind": "ftp", "url": "https://x"}), "bundled, hub, url"),
    "source without a kind": (changed("source", {"url": "https://x"}), "bundled, hub, url"),
    "plain http": (changed("source.url", "http://example.org/a.tflite"), "begin with https://"),
    "absolute path": (changed("source", {"kind": "bundled", "file": "/etc/passwd"}), "relative path"),
    "path upwards": (changed("source", {"kind": "bundled", "file": "a/../../b.safetensors"}), "relative path"),
    "drive letter": (changed("source", {"kind": "bundled", "file": "C:a.safetensors"}), "relative path"),
    "backslash": (changed("source", {"kind": "bundled", "file": "a\\b.safetensors"}), "relative path"),
    "hub file upwards": (changed("source", {"kind": "hub", "repo": "a/b", "revision": "v1", "file": "../c"}), "relative path"),
    "unpinned revision": (changed("source", {"kind": "hub", "repo": "a/b", "revision": "main", "file": "c"}), "pinned"),
    "repository without owner": (changed("source", {"kind": "hub", "repo": "b", "revision": "v1", "file": "c"}), "owner/name"),
    "unknown architecture": (changed("config.architecture", "deeplabv4"), "one of deeplabv3, deeplabv3plus"),
    "impossible stride": (changed("config.output_stride", 4), "8, 16 or 32"),
    "unknown padding": (changed("config.encoder_padding", "valid"), "symmetric, same"),
    "four means": (changed("preprocessing.mean", [0.5] * 4), "one of each per input channel"),
    "list as text": (changed("preprocessing.size", "513"), "must be a list"),
    "unknown data": (changed("data", "vocc"), "data must be one of voc"),
    "unknown verification": (changed("verified", "looks fine"), "measured here"),
    "measured without a command": (without("metrics.0.command"), "needs its command"),
    "figure above 100": (changed("metrics.0.value", 100.1), "between 0 and 100"),
    "figure below 0": (changed("metrics.0.value", -0.1), "between 0 and 100"),
    "class figure above 100": (changed("metrics.0.per_class", {"cat": 100.1}), "class cat is between 0 and 100"),
    "class figure below 0": (changed("metrics.0.per_class", {"cat": -0.1}), "class cat is between 0 and 100"),
    "class figure as text": (changed("metrics.0.per_class", {"cat": "72"}), r"per_class.cat must be a number"),
    "classes without names": (changed("metrics.0.per_class", [72.0]), "per_class must be an object"),
    "training without a recipe": (changed("training", {"recipe": "voc"}), "training lacks the field"),
    "short digest of a recipe": (changed("training", {**TRAINING, "recipe_sha256": "ab12"}), "64 hexadecimal digits"),
    "training for no step": (changed("training", {**TRAINING, "steps": 0}), "steps must be at least 1"),
    "figure of unknown origin": (changed("metrics.0.origin", "heard"), "published, measured"),
    "tag with a dot": (changed("tag", "a.b"), "lower-case letters"),
    "later schema": ({"schema": 2, "rows": []}, "update deeplabzoo"),
    "earlier schema": ({"schema": 0, "rows": []}, "update deeplabzoo"),
    "rows not a list": ({"schema": 1, "rows": {}}, "must be a list"),
}


@pytest.mark.parametrize("name", WRONG)
def test_schema_and_types_refuse_the_same_mistakes(name: str) -> None:
    """A hand-edited manifest fails in the editor, in a test and at load, never later in somebody's download."""
    plain, reason = WRONG[name]
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(plain, SCHEMA)
    with pytest.raises(WeightsError, match=reason):
        decode_dataclass(manifest.Manifest, plain, "manifest.json")


@pytest.mark.parametrize(
    ("plain", "reason"),
    [
        (with_rows(first_row(), first_row()), "is listed twice"),
        (with_rows(first_row(), first_row(tag="other")), "exactly one default tag, not 2"),
        (with_rows(first_row(default=False)), "exactly one default tag, not 0"),
        (changed("sha256_prefix", "00000000"), "contradict"),
        (changed("config.num_classes", 20), "voc has 21 classes, not 20"),
        (changed("config.num_classes", 22), "voc has 21 classes, not 22"),
        (with_rows(first_row(verified="measured here", metrics=[])), "has no measured metric"),
        (with_rows(first_row(verified="measured here", metrics=[PUBLISHED])), "has no measured metric"),
    ],
)
def test_rules_across_fields_and_rows_are_kept(plain: dict[str, Any], reason: str) -> None:
    """What a JSON schema cannot express is checked at load."""
    with pytest.raises(WeightsError, match=reason):
        decode_dataclass(manifest.Manifest, plain, "manifest.json")


def test_a_row_of_our_own_records_its_training() -> None:
    """Recipe, pictures and seed in one phrase of the line; schema and types take the same fields."""
    plain = with_rows(first_row(metrics=[{**METRIC, "per_class": {"cat": 88.7, "sofa": None}}], training=TRAINING))
    jsonschema.validate(plain, SCHEMA)
    row = decode_dataclass(manifest.Manifest, plain, "m").rows[0]
    assert "trained here with recipe deeplabv3plus_mobilenetv2_voc (changed) on 330 images of voc train, seed 0" in str(row)
    assert row.metrics[0].per_class == {"cat": 88.7, "sofa": None}
    assert row.training is not None
    expected = "python -m deeplabzoo.train deeplabv3plus_mobilenetv2_voc --root DATA --out DIR --set lr=0.01"
    assert row.training.command == expected
    assert len({row, row}) == 1


def test_a_file_that_is_not_json_is_named(tmp_path: Path) -> None:
    file = tmp_path / "manifest.json"
    file.write_text('{"schema": 1, "rows": [')
    with pytest.raises(WeightsError, match="cannot be read as JSON"):
        read_manifest(file)


def test_every_published_url_is_pinned() -> None:
    """A branch name in a URL is a file that changes under our hash (asks.md theme H: weights that rotted)."""
    for row in released():
        if isinstance(row.source, manifest.UrlSource) and "github.com" in row.source.url:
            at_commit = any(len(part) == 40 for part in row.source.url.split("/"))
            assert at_commit or "/releases/download/" in row.source.url, row.full_name


def test_a_row_reads_as_one_line() -> None:
    """list_weights prints the class list, figure with protocol, licence, verification and source of a file."""
    row = decode_dataclass(manifest.Manifest, with_rows(first_row(metrics=[METRIC], verified="measured here")), "m").rows[0]
    for word in (
        "coral (default)",
        "21 classes",
        "mIoU 72.4 %",
        "union > 0",
        "Apache-2.0",
        "measured here",
        "2.2 MB",
        "https:",
    ):
        assert word in str(row)
    assert "\n" not in str(row)
