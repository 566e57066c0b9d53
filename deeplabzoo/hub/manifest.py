"""Typed rows of `weights/manifest.json`: each released checkpoint with source, hash, configuration, metrics and licence."""

import functools
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from deeplabzoo.data.classes import CLASS_LISTS
from deeplabzoo.errors import WeightsError
from deeplabzoo.models.config import DeepLabConfig, Preprocessing
from deeplabzoo.strict_json import decode_dataclass, parse_json

_DIGITS = frozenset("0123456789abcdef")


@dataclass(frozen=True, kw_only=True)
class Training:
    """The training run of a checkpoint of this project; fields that the run did not record are None."""

    recipe: str
    """Name of the recipe: `python -m deeplabzoo.train RECIPE`."""
    recipe_sha256: str
    """Digest of the recipe fields that determine the result (`Recipe.digest`)."""
    overrides: tuple[str, ...]
    """`--set` arguments: differences from the recipe of that name at the time of publication."""
    commit: str | None
    """Git commit of the training code."""
    seed: int
    steps: int
    step: int | None
    """Step of the released weights (the best on val, or the last)."""
    epochs: float | None
    """Mean number of times that each training image was seen."""
    data: str
    split: str
    images: int | None
    """Number of training images."""
    split_sha256: str | None
    """`split_hash` of the image names: rows with equal hashes were trained on the same images."""
    initial_weights: str
    chosen: Literal["best", "last"]
    """Whether the step was selected on val ("best") or is the last one."""
    hours: float
    """Hours of optimizer steps, without evaluations."""
    hardware: str
    torch: str
    date: str
    """ISO date on which the run ended."""
    changed_after: tuple[int, ...] = ()
    """Steps after which the run was resumed with a changed recipe; `command` reproduces only runs without any."""

    def __post_init__(self) -> None:
        for name, value in (("recipe_sha256", self.recipe_sha256), ("split_sha256", self.split_sha256)):
            if value is not None and (len(value) != 64 or not _DIGITS.issuperset(value)):
                raise WeightsError(f"training.{name} must be 64 hexadecimal digits, not {value!r}.")
        if self.steps < 1:
            raise WeightsError(f"training.steps must be at least 1, not {self.steps}.")

    @property
    def command(self) -> str:
        """Command that repeats the run on the dataset in DATA."""
        data = "" if self.data == "shapes" else " --root DATA"
        changes = "".join(f" {_quoted(one)}" for one in self.overrides)
        return f"python -m deeplabzoo.train {self.recipe}{data} --out DIR{' --set' if changes else ''}{changes}"

    def __str__(self) -> str:
        images_text = f"{self.images} images of " if self.images else ""
        changed = " (changed)" if self.overrides or self.changed_after else ""
        return f"trained here with recipe {self.recipe}{changed} on {images_text}{self.data} {self.split}, seed {self.seed}"


def _quoted(argument: str) -> str:
    """Quote an argument for a POSIX shell where it needs quotes; also correct for Windows file names, unlike `shlex`."""
    plain = all(character.isalnum() or character in "=.,_-+:/" for character in argument)
    return argument if plain else "'" + argument.replace("'", "'\"'\"'") + "'"


SCHEMA_VERSION = 1
_NAME = re.compile(r"[a-z0-9]+(_[a-z0-9]+)+")
_TAG = re.compile(r"[a-z0-9]+([_-][a-z0-9]+)*")


@dataclass(frozen=True)
class BundledSource:
    """A file inside the wheel, beside the manifest."""

    kind: Literal["bundled"]
    file: str

    def __post_init__(self) -> None:
        _relative(self.file)

    def __str__(self) -> str:
        return f"bundled {self.file}"


@dataclass(frozen=True)
class HubSource:
    """A file of a Hugging Face Hub repository at a pinned revision (a commit, a tag or `refs/pr/N`)."""

    kind: Literal["hub"]
    repo: str
    revision: str
    file: str

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", self.repo):
            raise WeightsError(f"repo must read owner/name, not {self.repo!r}.")
        if self.revision in ("", "main"):
            raise WeightsError(f"revision must be pinned to a commit, a tag or refs/pr/N, not {self.revision!r}.")
        _relative(self.file)

    def __str__(self) -> str:
        return f"hf-hub:{self.repo}@{self.revision[:12]}/{self.file}"


@dataclass(frozen=True)
class UrlSource:
    """A file on a web server."""

    kind: Literal["url"]
    url: str

    def __str__(self) -> str:
        return self.url


Source = BundledSource | HubSource | UrlSource


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One metric with its evaluation protocol; metrics compare only where protocol, data, split and images are equal."""

    name: str
    value: float
    unit: Literal["%"]
    protocol: str
    """Evaluation protocol in words: definition of mIoU, input geometry, resolution of the comparison."""
    data: str
    split: str
    images: int | None
    output_stride: int | None
    scales: tuple[float, ...]
    flip: bool
    origin: Literal["published", "measured"]
    subset: str | None = None
    """Describes the subset where fewer images were scored than the official split has; None for the full split."""
    image_list_sha256: str | None = None
    """SHA-256 over the sorted image names, as in an evaluation report."""
    command: str | None = None
    """Command that measures it again; required where `origin` is "measured"."""
    date: str | None = None
    hardware: str | None = None
    report: str | None = None
    """Source of a published metric, or the JSON report of a measured one."""
    per_class: Mapping[str, float | None] | None = field(default=None, hash=False)
    """Values by class name, in %; None for classes that neither labels nor predictions contain."""

    def __post_init__(self) -> None:
        if self.origin == "measured" and not (self.command and self.date and self.images):
            raise WeightsError("a measured metric needs its command, date and number of images.")
        if not 0 <= self.value <= 100:
            raise WeightsError(f"a metric in % is between 0 and 100, not {self.value!r}.")
        if self.image_list_sha256 is not None and not re.fullmatch(r"[0-9a-f]{64}", self.image_list_sha256):
            raise WeightsError(f"image_list_sha256 must be 64 hexadecimal digits, not {self.image_list_sha256!r}.")
        for name, value in (self.per_class or {}).items():
            if value is not None and not 0 <= value <= 100:
                raise WeightsError(f"the metric of class {name} is between 0 and 100, not {value!r}.")

    @property
    def images_text(self) -> str:
        """Number of images in words; a subset is called a subset."""
        return self.subset or (f"{self.images} images" if self.images else "number of images not published")


@dataclass(frozen=True, kw_only=True)
class License:
    """Licences of the code that made the file, of the file itself, and of the training images."""

    code: str
    weights: str
    data: str


@dataclass(frozen=True, kw_only=True)
class WeightRow:
    """One released checkpoint of one model: `name.tag`."""

    name: str
    tag: str
    default: bool
    """Whether `create(name, pretrained=True)` loads this row; true for exactly one row of each name."""
    origin: str
    """Format of the file: "deeplabzoo", or the converter that reads it (deeplabzoo/checkpoints/converters)."""
    source: Source
    bytes: int | None
    sha256: str | None
    sha256_prefix: str | None
    """The first 8 or more hexadecimal digits, where the publisher states no full hash."""
    config: DeepLabConfig
    preprocessing: Preprocessing
    data: str
    """Name of the class list (deeplabzoo/data/classes.py) of the output channels."""
    metrics: tuple[Metric, ...]
    license: License
    verified: Literal["measured here", "parity with the origin's code on random weights", "layout only"]
    notes: str
    training: Training | None = None
    """Training run, for weights of this project."""

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name) or not _TAG.fullmatch(self.tag):
            raise WeightsError(
                f"name and tag are lower-case letters, digits and underscores, not {self.name!r} and {self.tag!r}."
            )
        if self.data not in CLASS_LISTS:
            raise WeightsError(f"data must be one of {', '.join(CLASS_LISTS)}, not {self.data!r}.")
        if len(CLASS_LISTS[self.data].classes) != self.config.num_classes:
            raise WeightsError(f"{self.data} has {len(CLASS_LISTS[self.data].classes)} classes, not {self.config.num_classes}.")
        if self.bytes is not None and self.bytes < 1:
            raise WeightsError(f"bytes must be at least 1, not {self.bytes}.")
        for digest, value, pattern in (
            ("sha256", self.sha256, r"[0-9a-f]{64}"),
            ("sha256_prefix", self.sha256_prefix, r"[0-9a-f]{8,63}"),
        ):
            if value is not None and not re.fullmatch(pattern, value):
                raise WeightsError(f"{digest} must match {pattern}, not {value!r}.")
        if self.sha256 and self.sha256_prefix and not self.sha256.startswith(self.sha256_prefix):
            raise WeightsError("sha256 and sha256_prefix contradict each other.")
        if self.verified == "measured here" and not any(metric.origin == "measured" for metric in self.metrics):
            raise WeightsError('verified is "measured here", but metrics has no measured metric.')

    @property
    def full_name(self) -> str:
        """`name.tag`."""
        return f"{self.name}.{self.tag}"

    def __str__(self) -> str:
        metrics = [
            f"{m.name} {m.value:g} {m.unit} ({m.origin}: {m.data} {m.split}, {m.images_text}, {m.protocol})"
            for m in self.metrics
        ]
        facts = (
            f"{self.data}, {self.config.num_classes} classes",
            *(metrics or ["no metric"]),
            *([str(self.training)] if self.training else []),
            f"licence {self.license.weights}",
            self.verified,
            f"{self.bytes / 1e6:.1f} MB" if self.bytes else "size not published",
            str(self.source),
        )
        return f"{self.full_name}{' (default)' if self.default else ''}: {'; '.join(facts)}"


@dataclass(frozen=True)
class Manifest:
    """All rows of one manifest file."""

    schema: int
    rows: tuple[WeightRow, ...]

    def __post_init__(self) -> None:
        if self.schema != SCHEMA_VERSION:
            raise WeightsError(f"this version reads schema {SCHEMA_VERSION}, not {self.schema}; update deeplabzoo.")
        seen: set[str] = set()
        for row in self.rows:
            if row.full_name in seen:
                raise WeightsError(f"{row.full_name} is listed twice; published weights are never replaced under the same tag.")
            seen.add(row.full_name)
            if isinstance(row.source, UrlSource) and not row.source.url.startswith("https://"):
                raise WeightsError(f"the url of {row.full_name} must begin with https://, not {row.source.url!r}.")
        for name in {row.name for row in self.rows}:
            defaults = [row.tag for row in self.rows if row.name == name and row.default]
            if len(defaults) != 1:
                raise WeightsError(f"{name} must have exactly one default tag, not {len(defaults)} ({', '.join(defaults)}).")

    def __iter__(self) -> Iterator[WeightRow]:
        return iter(self.rows)


def _relative(file: str) -> None:
    path = PurePosixPath(file)
    if not file or path.is_absolute() or ".." in path.parts or "\\" in file or ":" in file:
        raise WeightsError(f"file must be a relative path without '..', not {file!r}.")


@functools.cache
def weights_folder() -> Path:
    """Return the folder of the manifest and the bundled files: inside the wheel, or `weights/` of an editable install."""
    here = Path(__file__).resolve()
    for folder in (here.parent / "released", here.parents[2] / "weights"):
        if (folder / "manifest.json").is_file():
            return folder
    raise WeightsError("weights/manifest.json is missing from this installation of deeplabzoo; reinstall it.")


def read_manifest(path: Path) -> Manifest:
    """Read and validate a manifest file; raises WeightsError with the field and the reason."""
    try:
        plain = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise WeightsError(f"{path} cannot be read as JSON: {error}.") from None
    return decode_dataclass(Manifest, plain, path.name)


@functools.cache
def released() -> Manifest:
    """Return the manifest of this installation, read and validated once per process."""
    return read_manifest(weights_folder() / "manifest.json")


@functools.cache
def released_rows(name: str) -> tuple[WeightRow, ...]:
    """Return the rows of one model name, without a tag; they alone are checked, which is 100 times faster than all."""
    return tuple(_row(index) for index, plain in enumerate(_plain_rows()) if plain["name"] == name)


@functools.cache
def released_row_of(sha256: str) -> WeightRow | None:
    """Return the row of the released file with this hash."""
    return next((_row(index) for index, plain in enumerate(_plain_rows()) if plain["sha256"] == sha256), None)


@functools.cache
def _row(index: int) -> WeightRow:
    return decode_dataclass(WeightRow, _plain_rows()[index], f"manifest.json.rows[{index}]")


@functools.cache
def _plain_rows() -> tuple[Mapping[str, Any], ...]:
    """Return the rows of the installed manifest as plain JSON; a test reads all of them by `released`."""
    return tuple(json.loads((weights_folder() / "manifest.json").read_text(encoding="utf-8"))["rows"])
