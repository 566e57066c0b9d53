"""Every parser of what nobody vouches for keeps its promises on thousands of changed files; `make soak` tries millions."""

import base64
import json
import os
import random
from pathlib import Path

import pytest
from fuzz.__main__ import SECONDS, campaign, record
from fuzz.contract import Broken, Target, the_watch
from fuzz.mutation import mutated, mutated_json
from fuzz.targets import TARGETS
from trust_record import write_record

COUNTS = {"graphdef": 20, "names": 30, "settings": 30, "tflite": 40}
"""Inputs of a target that takes longer than most."""
INPUTS = 80


def found() -> list[tuple[str, bytes]]:
    """Inputs by which fuzzing found a defect, of up to 4 kB."""
    kept = json.loads((Path(__file__).parent / "fuzz" / "found.json").read_text())
    return [(name, base64.b64decode(data)) for name, files in kept.items() for data in files]


@pytest.mark.parametrize(("name", "data"), found())
def test_what_fuzzing_found_stays_fixed(name: str, data: bytes, tmp_path: Path) -> None:
    assert the_watch().run(TARGETS[name], data, tmp_path) is None


def inputs(target: Target, count: int, seed: int = 0) -> list[bytes]:
    """The target's seeds, and as many changed ones as `count` says."""
    random_ = random.Random(seed)
    seeds = target.seeds()
    found = list(seeds)
    for _ in range(count):
        data = random_.choice(seeds)
        changed = mutated_json(data, random_, target.words) if target.is_json and random_.random() < 0.7 else None
        found.append(changed or mutated(data, random_, target.words, target.max_bytes))
    return found


@pytest.mark.parametrize("name", TARGETS)
def test_no_changed_file_breaks_a_promise(name: str, tmp_path: Path) -> None:
    """Only our own errors in one printable line; no code, no other file, no more time and memory than stated."""
    target = TARGETS[name]
    broken: dict[str, Broken] = {}
    for data in inputs(target, COUNTS.get(name, INPUTS)):
        found = the_watch().run(target, data, tmp_path)
        if found is not None:
            broken.setdefault(found.where, found)
    assert not broken, "\n".join(f"{one.where}: {one.what}" for one in broken.values())


@pytest.mark.soak
@pytest.mark.timeout(0)
@pytest.mark.parametrize("name", TARGETS)
def test_twenty_minutes_of_fuzzing_break_no_promise(name: str, tmp_path: Path) -> None:
    """Guided by coverage; the 20 minutes are of processor time, and each target's are recorded."""
    pytest.importorskip("atheris", reason="fuzzing by coverage takes atheris: pip install atheris")
    seconds = float(os.environ.get("DEEPLABZOO_FUZZ_SECONDS", SECONDS))
    runs = campaign(name, tmp_path, seconds)
    write_record(record(name, runs))
    assert not [run.defects for run in runs if run.defects]
