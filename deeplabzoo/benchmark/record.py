"""What a benchmark found, as plain data: rows, and the conditions without which a row says nothing.

Every measuring module returns rows; the command writes them as one record, and tables and charts are made from records alone.
"""

import dataclasses
import datetime
import importlib.metadata
import itertools
import json
import os
import platform
import re
import shlex
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch

from deeplabzoo.errors import UsageError
from deeplabzoo.evaluation.report import hardware
from deeplabzoo.files import ensure_folder, write_atomically
from deeplabzoo.git import current_commit

RECORDS = Path("benchmarks")
"""Where `--json auto` writes, below the current folder."""
KIND = "deeplabzoo.benchmark/1"
"""What the first field of a record says, so that other JSON files are not taken for one."""
_LIBRARIES = (
    "deeplabzoo",
    "torch",
    "torchvision",
    "timm",
    "segmentation-models-pytorch",
    "transformers",
    "onnxruntime",
    "openvino",
    "numba",
    "torchmetrics",
    "numpy",
    "pillow",
)


@dataclass(frozen=True)
class Spread:
    """The median of several measurements with the quartiles around it."""

    median: float
    low: float
    """First quartile."""
    high: float
    """Third quartile."""

    @classmethod
    def of(cls, values: Sequence[float]) -> Self:
        """Return the spread of one or more values, quartiles interpolated between them (the inclusive rule)."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One thing measured: one side alone, or one side of ours against one of a peer's in the same turns.

    `ratio` is above 1 where ours is better: their time over ours, turn by turn, or their memory over ours.
    """

    name: str
    """What was run: a model's name, or the job in few words."""
    task: str
    """Heading under which rows are compared: `image -> labels`, `image -> logits`, `peak memory`, `confusion matrix`, ..."""
    side: str
    """Ours, with engine and precision."""
    threads: int
    peer: str | None = None
    """Whom it is compared with, and how that was run."""
    size: tuple[int, int] | None = None
    """Height and width in pixels."""
    batch: int = 1
    pairs: int = 1
    """Turns that each side had."""
    ms: Spread | None = None
    """Milliseconds a call of ours."""
    peer_ms: Spread | None = None
    ratio: Spread | None = None
    agreement: float | None = None
    """Share of the labels (0...1) that both sides give alike on the measured input."""
    figures: Mapping[str, float] = field(default_factory=dict)
    """Other numbers, each with its unit in its name (`images_per_s`, `peak_mb`, `gflop`, `share_of_gemm_peak`)."""
    note: str = ""

    @classmethod
    def paired(cls, own_times_ms: Sequence[float], peer_times_ms: Sequence[float] | None, **facts: Any) -> Self:
        """Return a row from the times of turns A B A B …; ratios are taken within a turn, so that drift cancels."""
        ratio = None
        if peer_times_ms is not None:
            ratio = Spread.of([theirs / ours for ours, theirs in zip(own_times_ms, peer_times_ms, strict=True)])
        return cls(
            pairs=len(own_times_ms),
            ms=Spread.of(own_times_ms),
            peer_ms=None if peer_times_ms is None else Spread.of(peer_times_ms),
            ratio=ratio,
            **facts,
        )


@dataclass(frozen=True, kw_only=True)
class Record:
    """Rows of one run with what is needed to judge and to repeat them."""

    rows: tuple[Row, ...]
    command: str
    precision: str
    """Of our sides, joined by `+`."""
    layout: str
    """Memory layout of our sides' tensors."""
    threads: int
    seed: int
    versions: Mapping[str, str]
    hardware: Mapping[str, Any]
    settings: Mapping[str, Any]
    """Switches that move a time: denormals, TF32, how a turn is made."""
    date: str
    """ISO 8601, UTC."""
    commit: str | None

    def to_json(self) -> str:
        """Return the record as indented JSON."""
        return json.dumps({"kind": KIND, **dataclasses.asdict(self)}, indent=2, allow_nan=False, ensure_ascii=False) + "\n"

    def write(self, path: Path) -> None:
        """Write the record whole or not at all; raises OutputError."""
        text = self.to_json()
        write_atomically(path, lambda file: file.write(text.encode()))

    def file_name(self) -> str:
        """Return `<date>_<hardware>_<torch>_<precision>_<layout>.json`, after timm's habit: a file list that can be read."""
        where = str(self.hardware.get("gpu") or self.hardware["cpu"])
        parts = (self.date[:10], f"{where}-{self.threads}t", f"torch-{self.versions['torch']}", self.precision, self.layout)
        return "_".join(re.sub(r"[^A-Za-z0-9.+]+", "-", part).strip("-").lower() for part in parts) + ".json"


def conditions(device: torch.device) -> dict[str, Any]:
    """Return the fields of a Record that the machine and the installation decide."""
    return {
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), **_versions()},
        "hardware": hardware(device),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": current_commit(),
    }


def reproduce_command(module: str, arguments: Sequence[str]) -> str:
    """Return the command of a record; the dataset folder of this machine is written as `$DEEPLABZOO_DATA`."""
    command = shlex.join(["python", "-m", module, *arguments])
    folder = os.environ.get("DEEPLABZOO_DATA")
    return command.replace(folder, "$DEEPLABZOO_DATA") if folder else command


def all_threads_flush_denormals() -> bool:
    """Whether torch's worker threads flush denormals to zero, found by computing with denormals in all of them."""
    tiny = torch.full((1 << 22,), 1e-39)
    return not bool((tiny * 1.0).any())


def runtime_settings(peaks: Mapping[str, float]) -> dict[str, Any]:
    """Return the switches that move a time, as a Record keeps them; `peaks` are GEMM GFLOP/s by number of threads."""
    return {
        "denormals": "zero in every thread" if all_threads_flush_denormals() else "zero in the main thread alone",
        "gemm_gflop_per_s": dict(peaks),
        "tf32_matmul": torch.backends.cuda.matmul.allow_tf32,
        "tf32_convolutions": torch.backends.cudnn.allow_tf32,
    }


def read_record(path: Path) -> Record:
    """Return the record that a file holds; raises UsageError for what is none."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values.pop("kind") != KIND:
            raise ValueError(f"its kind is not {KIND}")
        rows = tuple(_row(row) for row in values.pop("rows"))
        return Record(rows=rows, **values)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"'{path}' is not a record of `python -m deeplabzoo.benchmark --json`: {error}.") from None


def _row(values: dict[str, Any]) -> Row:
    for name in ("ms", "peer_ms", "ratio"):
        if values[name] is not None:
            values[name] = Spread(**values[name])
    if values["size"] is not None:
        values["size"] = tuple(values["size"])
    return Row(**values)


def _versions() -> dict[str, str]:
    found = {}
    for name in _LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def record_path(json: str | None, record: Record) -> Path | None:
    """Return the file to write: a name after the conditions for `auto`, numbered where that is taken."""
    if json is None:
        return None
    path = Path(json) if json != "auto" else RECORDS / record.file_name()
    ensure_folder(path.parent)
    if json != "auto":
        return path
    numbered = (path.with_name(f"{path.stem}_{number}{path.suffix}") for number in itertools.count(2))
    return next(one for one in itertools.chain([path], numbered) if not one.exists())
