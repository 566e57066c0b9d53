"""Foreign checkpoint formats, one module each: it recognises its files by their content and converts them into our terms.

A new format is a module with `ORIGIN`, `recognise` and `convert`, named in `ORIGINS` below.
"""

from pathlib import Path
from typing import Protocol

from deeplabzoo.errors import WeightsError
from deeplabzoo.zoo.origins import tflite
from deeplabzoo.zoo.origins.converted import Converted as Converted


class Origin(Protocol):
    """What a module of this package offers."""

    ORIGIN: str
    """Name of the format, as in the manifest's `origin`."""

    def recognise(self, path: Path) -> bool:
        """Whether the file is of this format; never raises."""

    def convert(self, path: Path) -> Converted:
        """Read the file; raises WeightsError in one sentence."""


ORIGINS: tuple[Origin, ...] = (tflite,)


def identify(path: Path) -> Origin | None:
    """Return the origin that recognises a file by its content, or None."""
    return next((origin for origin in ORIGINS if origin.recognise(path)), None)


def convert(path: Path) -> Converted:
    """Convert a foreign file of any known format; raises WeightsError where none recognises it."""
    origin = identify(path)
    if origin is None:
        known = ", ".join(one.ORIGIN for one in ORIGINS)
        raise WeightsError(f"'{path}' is of no foreign format that deeplabzoo knows ({known}).")
    return origin.convert(path)
