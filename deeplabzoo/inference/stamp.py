"""The mark in a result that tells what it was made of; `deeplabzoo.inference.done` makes and compares it."""

from PIL.PngImagePlugin import PngInfo

from deeplabzoo.inference.formats import Kind

STAMP_KEY = "made_of"
"""Keyword of the text in a PNG, and key in the JSON."""


def drawn(stamp: str, kind: Kind, alpha: float, legend: bool) -> str:
    """Return the stamp as a file of this kind carries it: an overlay depends on how it is drawn, too."""
    return f"{stamp} alpha {alpha:g}{' legend' if legend else ''}" if kind == "overlay" else stamp


def png_text(stamp: str) -> PngInfo:
    """Return what Pillow writes into a PNG for it."""
    info = PngInfo()
    info.add_text(STAMP_KEY, stamp)
    return info
