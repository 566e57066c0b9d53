"""The models that the page offers: made at their first use, kept warm, one photo at a time in each."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from deeplabzoo.demo_page.answer import answer
from deeplabzoo.errors import DeepLabZooError, UnknownNameError, did_you_mean
from deeplabzoo.inference.predictor import Predictor
from deeplabzoo.zoo.manifest import BundledSource, released


class BusyError(DeepLabZooError):
    """More photos wait for a model than it will work through soon."""


class Room:
    """Memory for uploads that wait, of all models together; the first of them always has room."""

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes, self._taken_bytes = most_bytes, 0
        self._counting = threading.Lock()

    @contextmanager
    def taken(self, count_bytes: int) -> Iterator[None]:
        """Hold room for an upload, before it is read; raises BusyError where there is none left."""
        with self._counting:
            if self._taken_bytes and self._taken_bytes + count_bytes > self._most_bytes:
                raise BusyError("Too many large photos wait at the moment; try again in a few seconds.")
            self._taken_bytes += count_bytes
        try:
            yield
        finally:
            with self._counting:
                self._taken_bytes -= count_bytes


class WarmModel:
    """One model: loaded at its first photo, then kept; photos wait for each other, at most `most_waiting` of them."""

    def __init__(self, name: str, load: Callable[[], Predictor], most_waiting: int) -> None:
        self.name = name
        self._load = load
        self._predictor: Predictor | None = None
        self._turn = threading.Lock()
        self._places = threading.BoundedSemaphore(most_waiting)

    def warm(self) -> None:
        """Load the model now and bring it into the form that runs; raises what loading raises."""
        with self._turn:
            self._ready()

    @contextmanager
    def place(self) -> Iterator[None]:
        """Hold a place in the queue; taken before an upload is read, so that what waits is bounded. Raises BusyError."""
        if not self._places.acquire(blocking=False):
            raise BusyError(f"Too many photos wait for {self.name} at the moment; try again in a few seconds.")
        try:
            yield
        finally:
            self._places.release()

    def segment(self, upload: bytes, max_pixels: int) -> dict[str, Any]:
        """Return `answer` for an upload when its turn comes, with the seconds it waited; raises ImageError."""
        asked = time.perf_counter()
        with self._turn:
            waited = time.perf_counter() - asked
            content = answer(upload, self._ready(), max_pixels)
        return {**content, "model": self.name, "seconds": {"wait": round(waited, 5), **content["seconds"]}}

    def _ready(self) -> Predictor:
        if self._predictor is None:
            self._predictor = self._load()
            self._predictor.form()
        return self._predictor


class Models:
    """What the page offers, by the name that it shows; the first is taken unless another is chosen."""

    def __init__(self, names: Sequence[str], load: Callable[[str], Predictor], most_waiting: int) -> None:
        self._models: dict[str, WarmModel] = {}
        for name in dict.fromkeys(names):
            shown = Path(name).name if Path(name).is_file() else name
            shown = name if shown in self._models else shown
            self._models[shown] = WarmModel(shown, lambda name=name: load(name), most_waiting)  # type: ignore[misc]

    @property
    def names(self) -> list[str]:
        """Names in the order of the list that the page shows."""
        return list(self._models)

    def __getitem__(self, name: str) -> WarmModel:
        """Return a model; raises UnknownNameError, as only what the command line named can be asked for."""
        if name not in self._models:
            raise UnknownNameError(
                f"This demo has no model {name[:80]!r}; it offers {', '.join(self._models)}.{did_you_mean(name, self._models)}"
            )
        return self._models[name]


def bundled_models() -> list[str]:
    """Return the models whose weights came with the package, the VOC classes first: they know the most kinds of things."""
    rows = [row for row in released().rows if isinstance(row.source, BundledSource)]
    return [row.full_name for row in sorted(rows, key=lambda row: -row.config.num_classes)]
