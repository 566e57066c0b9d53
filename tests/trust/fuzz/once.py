"""A process of its own that lets targets read every file of their folders, under limits, and prints what came of each as JSON.

`python -m fuzz.once TARGET=FOLDER …`: an object of target -> file name -> [kind, text], where kind is `read`, the name of our
error, or `broken` for a promise that was broken.
"""

import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from deeplabzoo.errors import DeepLabZooError
from fuzz.contract import Target, limit_memory, the_watch
from fuzz.targets import TARGETS


def outcomes(target: Target, files: list[Path]) -> dict[str, tuple[str, str]]:
    """Return what came of each file."""
    with TemporaryDirectory() as folder:
        for data in target.seeds():
            the_watch().run(target, data, Path(folder))
        limit_memory(4 * target.mebibytes)
        return {file.name: _outcome(target, file.read_bytes(), Path(folder)) for file in files}


def _outcome(target: Target, data: bytes, folder: Path) -> tuple[str, str]:
    watch = the_watch()
    broken = watch.run(target, data, folder)
    if broken is not None:
        return "broken", broken.what
    said = watch.outcome
    return ("read", "") if said is None else (type(said).__name__, str(said)) if isinstance(said, DeepLabZooError) else ("", "")


if __name__ == "__main__":
    pairs = (argument.split("=", 1) for argument in sys.argv[1:])
    print(json.dumps({name: outcomes(TARGETS[name], sorted(Path(folder).iterdir())) for name, folder in pairs}))
