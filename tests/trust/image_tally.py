"""Counts what becomes of hostile pictures, and keeps the first that breaks each promise."""

import time
from pathlib import Path

from fuzz.contract import Broken, Target, Watch, the_watch
from image_attacks import ENTRANCES, window_files


def warmed(folder: Path) -> Watch:
    """Return a watch over readers that have imported what they need."""
    watch = the_watch()
    for target in ENTRANCES.values():
        assert watch.run(target, window_files()["tiles"], folder) is None
        (folder / target.file_name).unlink()
    return watch


class Tally:
    """What became of many inputs; `broken` has the first input for each place where a promise was broken."""

    def __init__(self, watch: Watch, folder: Path) -> None:
        self.watch, self.folder = watch, folder
        self.answered = self.refused = 0
        self.broken: dict[str, tuple[Broken, str]] = {}
        self.slowest_s = 0.0

    def read(self, entrance: str | Target, data: bytes, kind: str) -> bool:
        """Try one input; True where it was answered."""
        target = ENTRANCES[entrance] if isinstance(entrance, str) else entrance
        began = time.process_time()
        broken = self.watch.run(target, data, self.folder)
        (self.folder / target.file_name).unlink()
        self.slowest_s = max(self.slowest_s, time.process_time() - began)
        if broken is not None:
            self.broken.setdefault(broken.where, (broken, f"{kind} through {target.name}"))
        answered = self.watch.outcome is None
        self.answered += answered
        self.refused += not answered
        return answered

    @property
    def inputs(self) -> int:
        return self.answered + self.refused

    def verdict(self) -> str:
        """All that was broken; empty where every promise held."""
        return "\n".join(f"{kind}: {broken.what} ({broken.where})" for broken, kind in self.broken.values())
