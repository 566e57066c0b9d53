"""Damaged, lying and odd pictures through every function that reads one: pixels, or one sentence, in stated time and memory.

`make soak` cuts at every byte, changes thousands of files, and reads bombs in a process that cannot grow.
"""

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from fuzz.contract import Watch
from fuzz.mutation import mutated
from image_attacks import ENTRANCES, MODES, common_files, every_file, window_files
from image_bombs import gigapixels, growing
from image_tally import Tally, warmed
from trust_record import TrustRecord, write_record

from deeplabzoo.data.image_io import read_image, read_mask
from deeplabzoo.errors import ImageError

PARTS = Path(__file__).resolve().parent
CHANGES, CHANGES_IN_WINDOWS = 10_000, 5_000
"""Changed files that a soak run tries."""
COMMAND = "DEEPLABZOO_RECORD=1 python -m pytest -m soak tests/trust/test_hostile_images.py"


@pytest.fixture(scope="module")
def watch(tmp_path_factory: pytest.TempPathFactory) -> Watch:
    return warmed(tmp_path_factory.mktemp("warm"))


def cut_short(tally: Tally, step: int) -> list[str]:
    """Read the common files cut at every `step`-th byte, and return those that gave a picture that is not the whole one."""
    partial = []
    for number, (kind, data) in enumerate(common_files().items()):
        path = tally.folder / "whole.png"
        path.write_bytes(data)
        whole, numbers = read_image(path), _mask_or_none(path)
        path.unlink()
        for length in range(1 + number % step, len(data), step):
            for entrance, right in (("photo", whole), ("mask", numbers)):
                if tally.read(entrance, data[:length], kind):
                    path.write_bytes(data[:length])
                    got = read_image(path) if entrance == "photo" else read_mask(path)
                    path.unlink()
                    if right is None or not np.array_equal(got, right):
                        partial.append(f"{kind} through {entrance}: {length} of {len(data)} bytes")
    for kind, data in window_files().items():
        for length in range(1, len(data), step):
            tally.read("windows", data[:length], f"tiff of {kind}")
    return partial


def _mask_or_none(path: Path) -> np.ndarray | None:
    try:
        return read_mask(path)
    except Exception:
        return None


def changed(tally: Tally, count: int, count_in_windows: int, seed: int = 0) -> None:
    """Read so many changed files of every format that Pillow writes, and of every layout that is read in windows."""
    random_ = random.Random(seed)
    files = list({**every_file(), **common_files()}.items())
    layouts = list(window_files().items())
    for _ in range(count):
        kind, data = random_.choice(files)
        tally.read(random_.choice(("photo", "photo", "upload", "mask", "header")), mutated(data, random_), kind)
    for _ in range(count_in_windows):
        kind, data = random_.choice(layouts)
        tally.read("windows", mutated(data, random_), f"tiff of {kind}")


def test_an_image_cut_short_is_refused_or_whole(watch: Watch, tmp_path: Path) -> None:
    """Never half a picture, never another error."""
    tally = Tally(watch, tmp_path)
    partial = cut_short(tally, 61)
    assert not tally.verdict()
    assert not partial
    assert tally.refused > 200


def test_a_jpeg_2000_without_its_end_is_refused(tmp_path: Path) -> None:
    """Its decoder takes a codestream that ends behind the header for an empty picture."""
    whole, path = common_files()["jp2"], tmp_path / "a.jp2"
    for length in range(150, len(whole) - 2):
        path.write_bytes(whole[:length])
        with pytest.raises(ImageError):
            read_image(path)


def test_changed_bytes_never_escape_as_another_error(watch: Watch, tmp_path: Path) -> None:
    """Pixels or one of our sentences; no other file read, nothing written, in the time and memory stated."""
    tally = Tally(watch, tmp_path)
    changed(tally, 60, 60)
    assert not tally.verdict()
    assert min(tally.answered, tally.refused) > 20


@pytest.mark.parametrize("bombs", [gigapixels, growing], ids=["gigapixels", "growing"])
def test_bombs_stay_small(bombs, watch: Watch, tmp_path: Path) -> None:
    """A few bytes that claim gigapixels, or that become gigabytes, take no more memory and time than a picture may."""
    tally = Tally(watch, tmp_path)
    for kind, data in bombs().items():
        for entrance in ENTRANCES:
            answered = tally.read(entrance, data, kind)
            assert not (bombs is gigapixels and answered and entrance != "header"), f"{kind} through {entrance}"
    assert not tally.verdict()


def test_a_tile_is_inflated_to_its_size_and_no_further(watch: Watch, tmp_path: Path) -> None:
    """Half a gigabyte in one tile of 16 x 16 pixels."""
    tally = Tally(watch, tmp_path)
    assert not tally.read("windows", growing()["tiff of a tile that inflates"], "tile")
    assert "inflates to more than 1536 bytes" in str(watch.outcome)


def test_an_image_in_an_icon_is_held_to_the_limit(tmp_path: Path) -> None:
    """Icons are decoded while they are opened, before a size can be asked for."""
    path = tmp_path / "favicon.png"
    path.write_bytes(gigapixels()["ico that holds a png"])
    with pytest.raises(ImageError, match="more pixels than the limit of 256000000"):
        read_image(path)


@pytest.mark.parametrize("mode", MODES)
def test_every_kind_of_pixel_is_an_image_or_a_sentence(mode: str, watch: Watch, tmp_path: Path) -> None:
    """Palettes, alpha, four inks, Lab, 16 and 32 bits, floats: each in every format that holds it."""
    tally = Tally(watch, tmp_path)
    for kind, data in every_file().items():
        if kind.endswith(f" {mode}"):
            tally.read("photo", data, kind)
            tally.read("mask", data, kind)
    assert not tally.verdict()
    assert tally.inputs


@pytest.mark.soak
@pytest.mark.timeout(7200)
def test_hostile_images_in_full(watch: Watch, tmp_path: Path) -> None:
    """Every cut, every bomb in a process that may not grow, and thousands of changed files; the record says so."""
    began = time.monotonic()
    cuts, changes = Tally(watch, tmp_path), Tally(watch, tmp_path)
    partial = cut_short(cuts, 1)
    changed(changes, CHANGES, CHANGES_IN_WINDOWS, seed=1)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(PARTS), str(PARTS.parent)))}
    process = subprocess.run(
        [sys.executable, PARTS / "image_bombs.py"], capture_output=True, text=True, env=environment, check=True
    )
    bombs = [json.loads(line) for line in process.stdout.splitlines()]
    broken = [one for one in bombs if one["broken"]]
    inputs = cuts.inputs + changes.inputs + len(bombs)
    failed = len(cuts.broken) + len(partial) + len(changes.broken) + len(broken)
    write_record(
        TrustRecord(
            name="hostile_images",
            area="images",
            what="Pictures cut at every byte, changed at random or larger than they look, through every entrance.",
            command=COMMAND,
            seconds=round(time.monotonic() - began, 1),
            inputs=inputs,
            faults=inputs,
            survived=inputs - failed,
            details={
                "cut": cuts.inputs,
                "changed": changes.inputs,
                "bombs": len(bombs),
                "answered": cuts.answered + changes.answered + sum(not one["sentence"] for one in bombs),
                "refused": cuts.refused + changes.refused + sum(bool(one["sentence"]) for one in bombs),
                "slowest_s": round(max(cuts.slowest_s, changes.slowest_s), 2),
                "formats": len(every_file()),
            },
        )
    )
    assert not cuts.verdict()
    assert not partial
    assert not changes.verdict()
    assert not broken
