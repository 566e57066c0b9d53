"""What an installation costs: the wheel, the light install, each extra on top of it, and `import deeplabzoo`.

`python -m benchmarks.install --json FILE` builds the wheel, downloads what it and its extras need into a folder, and installs
from there without a network: the light install into a fresh environment, each extra into a hard-linked copy of that one, so
that an extra's figures are what it adds. Everything is removed in the end. `--write DOCUMENT` puts a record's table into it.
"""

import argparse
import datetime
import json
import os
import platform
import re
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from deeplabzoo.benchmark.record import current_commit
from deeplabzoo.cli.parser import Parser, run
from deeplabzoo.errors import DeepLabZooError, UsageError
from deeplabzoo.evaluation.report import hardware
from deeplabzoo.files import ensure_folder, write_atomically
from deeplabzoo.log import logger
from tools.docs.tables import replace_block

KIND = "deeplabzoo.install/1"
BLOCK = "install-table"
ROOT = Path(__file__).resolve().parents[1]
_NOT_USERS = ("export", "test", "trust", "release")
"""Extras without a row: another name of one, and what contributors and releases need."""
_IMPORTS = 15


def measure(work: Path, wanted: Sequence[str]) -> dict[str, Any]:
    """Return the figures of the wheel, the light install, the `wanted` extras and the import; `work` is an empty folder."""
    wheel, wheels = _wheel(work), work / "wheels"
    logger.info(f"downloading what deeplabzoo[{','.join(wanted)}] needs")
    _pip(sys.executable, "download", "--quiet", "--dest", str(wheels), f"{wheel}[{','.join(wanted)}]", offline=False)
    python = _environment(work / "light")
    empty = size_bytes(work / "light")
    with _timed() as spent:
        _pip(str(python), "install", "--quiet", "--no-index", "--find-links", str(wheels), str(wheel))
    light = _packages(python)
    found: dict[str, Any] = {
        "wheel_bytes": wheel.stat().st_size,
        "light": {**spent, "disk_bytes": size_bytes(work / "light") - empty, **_added(light, {}, wheels)},
        "import": _import_times(python),
        "extras": {},
    }
    for extra in wanted:
        logger.info(f"[{extra}]")
        copy = work / "copy"
        shutil.copytree(work / "light", copy, symlinks=True, copy_function=os.link)
        own = copy / "bin" / "python"
        with _timed() as spent:
            _pip(str(own), "install", "--quiet", "--no-index", "--find-links", str(wheels), f"{wheel}[{extra}]")
        found["extras"][extra] = {
            **spent,
            "disk_bytes": size_bytes(copy, work / "light"),
            **_added(_packages(own), light, wheels),
        }
        shutil.rmtree(copy)
    return found


def table(record: Mapping[str, Any]) -> str:
    """Return the record as Markdown: its conditions, a line for the light install and for each extra, the command."""
    machine, one = record["hardware"], record["import"]
    rows = [("light: `pip install deeplabzoo`", record["light"])]
    rows += [(f"`deeplabzoo[{extra}]`, on top", figures) for extra, figures in record["extras"].items()]
    lines = ["| install | packages | MB to download | MB on disk | seconds | of processor time |", "|---|---|---|---|---|---|"]
    for name, figures in rows:
        cells = (_megabytes(figures["download_bytes"]), _megabytes(figures["disk_bytes"]))
        times = (f"{figures['seconds']:.0f}", f"{figures['processor_seconds']:.0f}")
        lines.append(f"| {name} | {len(figures['packages'])} | {' | '.join((*cells, *times))} |")
    beside = record["note"] or "nothing beside it"
    start = f"{one['processor_ms']:.0f} ms of processor time beyond the {one['python_ms']:.0f} ms of Python's own start"
    versions = (
        f"Python {record['python']}, pip {record['pip']}, torch {record['torch']} as the package index gives it for Linux"
    )
    return "\n".join(
        [
            f"The wheel has {record['wheel_bytes'] / 1e6:.1f} MB, the bundled weights included. `import deeplabzoo` takes "
            f"{start} (medians of {one['times']}).",
            "",
            *lines,
            "",
            f"{machine['cpu']}, {machine['cpus']} cores, {beside}; {versions}; {record['date'][:10]}. Seconds are those of "
            "`pip install` from wheels that lie on the disk, without a network: add your connection's time for the download.",
            "",
            f"Again: `{record['command']}`",
        ]
    )


def _wheel(work: Path) -> Path:
    _pip(sys.executable, "wheel", "--quiet", "--no-deps", "--wheel-dir", str(work / "own"), str(ROOT), offline=False)
    return next((work / "own").glob("*.whl"))


def _environment(folder: Path) -> Path:
    """Return the Python of a fresh environment."""
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    return folder / "bin" / "python"


def _pip(python: str, *words: str, offline: bool = True) -> None:
    """Run pip; where nothing may come from elsewhere, without the settings of this machine."""
    own = {key: value for key, value in os.environ.items() if not key.startswith("PIP_")}
    given = {**own, "PIP_CONFIG_FILE": os.devnull, "PIP_NO_CACHE_DIR": "1"} if offline else dict(os.environ)
    done = subprocess.run([python, "-m", "pip", *words], env=given, capture_output=True, text=True)
    if done.returncode:
        raise DeepLabZooError(f"pip {words[0]} failed: {done.stderr.strip().splitlines()[-1]}")


@contextmanager
def _timed() -> Iterator[dict[str, float]]:
    """Fill the yielded dict with the wall-clock and processor time that child processes took."""
    spent: dict[str, float] = {}
    began, before = time.monotonic(), _processor_seconds()
    yield spent
    spent.update(seconds=round(time.monotonic() - began, 1), processor_seconds=round(_processor_seconds() - before, 1))


def _processor_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def size_bytes(folder: Path, base: Path | None = None) -> int:
    """Return the bytes of the files of an environment that `base` has not."""
    known = {file.stat().st_ino for file in base.rglob("*") if file.is_file()} if base else set()
    files = (file.lstat() for file in folder.rglob("*") if file.is_file() and not file.is_symlink())
    return sum(one.st_size for one in files if one.st_ino not in known)


def _packages(python: Path) -> dict[str, str]:
    listed = subprocess.run([python, "-m", "pip", "list", "--format", "json"], capture_output=True, text=True, check=True)
    return {
        _plain(one["name"]): one["version"] for one in json.loads(listed.stdout) if one["name"] not in ("pip", "setuptools")
    }


def _added(packages: Mapping[str, str], base: Mapping[str, str], wheels: Path) -> dict[str, Any]:
    """Return the packages that `base` has not, and the bytes of their wheels (deeplabzoo's own is named apart)."""
    added = {name: version for name, version in packages.items() if base.get(name) != version and name != "deeplabzoo"}
    sizes = {_plain(file.name.split("-")[0]): file.stat().st_size for file in wheels.iterdir()}
    return {"packages": added, "download_bytes": sum(sizes[name] for name in added)}


def _import_times(python: Path) -> dict[str, float]:
    """Return milliseconds of processor time of an empty Python and of the import beyond it; the first runs fill the caches."""
    plain, whole = [], []
    for _ in range(_IMPORTS):
        for words, times in (("pass", plain), ("import deeplabzoo", whole)):
            before = _processor_seconds()
            subprocess.run([python, "-c", words], check=True)
            times.append(1000 * (_processor_seconds() - before))
    start = statistics.median(plain)
    return {"times": _IMPORTS, "python_ms": round(start, 1), "processor_ms": round(statistics.median(whole) - start, 1)}


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _megabytes(size_bytes: int) -> str:
    return f"{size_bytes / 1e6:.0f}" if size_bytes >= 9.5e6 else f"{size_bytes / 1e6:.1f}"


def extras() -> list[str]:
    """Return the extras that users install, as pyproject.toml names them."""
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    return [name for name in declared if name not in _NOT_USERS]


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser("install", "Measure what installing costs, or write the recorded figures into a document.")
    parser.prog = "python -m benchmarks.install"
    parser.add_argument("--json", type=Path, metavar="FILE", required=True, help="the record: written, or read by --write")
    parser.add_argument("--extras", nargs="+", default=extras(), metavar="EXTRA", help="default: every one for users")
    parser.add_argument("--work", type=Path, metavar="DIR", help="folder for some 10 GB (default: a temporary one)")
    parser.add_argument("--note", default="", help="what else the machine was doing; stands in the table")
    parser.add_argument("--write", type=Path, metavar="DOCUMENT", help="put the table into it; nothing is run")
    return parser.parse_args(argv)


def install_command(argv: Sequence[str] | None = None) -> int:
    """Measure and write the record, or write a record's table; raises DeepLabZooError where pip cannot do its part."""
    words = list(sys.argv[1:] if argv is None else argv)
    args = _options(words)
    if args.write:
        return _write(args.json, args.write)
    if unknown := sorted(set(args.extras) - set(extras())):
        raise UsageError(f"No such extra: {', '.join(unknown)}; expected some of {', '.join(extras())}.")
    ensure_folder(args.json.parent)
    with tempfile.TemporaryDirectory(dir=args.work, prefix="deeplabzoo-install-") as folder:
        found = measure(Path(folder), args.extras)
    pip = subprocess.run([sys.executable, "-m", "pip", "--version"], capture_output=True, text=True, check=True).stdout.split()[
        1
    ]
    record = {
        "kind": KIND,
        **found,
        "python": platform.python_version(),
        "pip": pip,
        "torch": found["light"]["packages"]["torch"],
        "hardware": hardware(torch.device("cpu")),
        "note": args.note,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": current_commit(),
        "command": f"python -m benchmarks.install --json {args.json}",
    }
    text = json.dumps(record, indent=2, ensure_ascii=False) + "\n"
    write_atomically(args.json, lambda file: file.write(text.encode()))
    return 0


def _write(record: Path, document: Path) -> int:
    try:
        values = json.loads(record.read_text(encoding="utf-8"))
        if values["kind"] != KIND:
            raise ValueError(f"its kind is not {KIND}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"'{record}' is not a record of `python -m benchmarks.install`: {error}.") from None
    text = replace_block(document, table(values), BLOCK).encode()
    write_atomically(document, lambda file: file.write(text))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    return run(install_command, argv)


if __name__ == "__main__":
    sys.exit(main())
