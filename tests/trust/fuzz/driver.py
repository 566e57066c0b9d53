"""The process that tries inputs on one target, guided by coverage (atheris), until its processor time is used up.

It never ends at a defect: each is kept with the input that showed it, once for each place, and the next input is tried. What
was done so far is in `progress.json`, whatever ends it: one entry a run, so that the next run, with a defect fixed, goes on.
"""

import importlib
import os
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import atheris

with atheris.instrument_imports(include=["deeplabzoo"]):
    from fuzz.targets import TARGETS

from fuzz.contract import Broken, Target, limited_memory, the_watch
from fuzz.mutation import mutated, mutated_json
from fuzz.progress import Run, runs_in, write_runs

_SPARE = 8
"""Times the memory stated for one input that the process may grow by before an allocation fails."""


class Driver:
    """One run: counts inputs, keeps the first input of every defect in `folder`, and leaves when `seconds` are used up."""

    def __init__(self, target: Target, folder: Path, seconds: float) -> None:
        self.target, self.folder, self.seconds = target, folder, seconds
        self.scratch = folder / "scratch"
        self.scratch.mkdir(parents=True, exist_ok=True)
        self.watch = the_watch()
        self.earlier = runs_in(folder)
        self.run = Run()
        self.started = 0.0

    def warm_up(self, files: Sequence[bytes]) -> None:
        """Let the target import and cache what it will need, on the inputs that fuzzing begins with."""
        for data in files:
            (self.scratch / self.target.file_name).write_bytes(data)
            try:
                self.target.parse(self.scratch / self.target.file_name)
            except Exception as error:
                print(f"seed: {type(error).__name__}: {error}", file=sys.stderr)
        self.started = time.process_time()

    def __call__(self, data: bytes) -> None:
        """Try one input."""
        self.run.inputs += 1
        broken = self.watch.run(self.target, data, self.scratch)
        if broken is not None and broken.where not in self.run.defects:
            self._keep(data, broken)
        if self.run.inputs % 200 == 0 or broken is not None:
            self._report()

    def _keep(self, data: bytes, broken: Broken) -> None:
        self.run.defects[broken.where] = broken.what
        (self.folder / f"defect_{len(self.earlier)}_{len(self.run.defects)}").write_bytes(data)

    def _report(self) -> None:
        self.run.seconds = time.process_time() - self.started
        write_runs(self.folder, [*self.earlier, self.run])
        if self.run.seconds > self.seconds:
            os._exit(0)

    def mutate(self, data: bytes, max_bytes: int, seed: int) -> bytes:
        """Return the input changed as the format suggests, or as libFuzzer does."""
        random_ = random.Random(seed)
        if (
            self.target.is_json
            and random_.random() < 0.7
            and (found := mutated_json(data, random_, self.target.words)) is not None
        ):
            return found[:max_bytes]
        if random_.random() < 0.4:
            return mutated(data, random_, self.target.words, max_bytes)
        return bytes(atheris.Mutate(data, max_bytes))


def main(name: str, folder: Path, seconds: float) -> NoReturn:
    """Fuzz until the time is used up."""
    target = TARGETS[name]
    corpus = folder / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    files = target.seeds()
    for index, data in enumerate(files):
        (corpus / f"seed_{index}").write_bytes(data)
    driver = Driver(target, folder, seconds)
    driver.warm_up(files)
    arguments = [
        f"-max_len={target.max_bytes}",
        f"-artifact_prefix={folder}/",
        "-timeout=600",
        "-rss_limit_mb=0",
        "-malloc_limit_mb=0",
        "-len_control=0",
        "-use_value_profile=0",
    ]
    atheris.Setup([name, *arguments, str(corpus)], driver, custom_mutator=driver.mutate)
    with limited_memory(_SPARE * target.mebibytes):
        atheris.Fuzz()
    raise SystemExit(0)


if __name__ == "__main__":
    importlib.import_module("torch").set_num_threads(1)
    main(sys.argv[1], Path(sys.argv[2]), float(sys.argv[3]))
