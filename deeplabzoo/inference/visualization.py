"""Overlays: the image tinted by class with thin outlines, and below it a legend of the classes found."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from deeplabzoo.data.image_io import Labels, Pixels
from deeplabzoo.errors import UsageError
from deeplabzoo.processing.postprocessing import ClassArea

Color = tuple[int, int, int]
Mask = np.ndarray[Any, np.dtype[np.bool_]]

LEGEND_BACKGROUND: Color = (255, 255, 255)
LEGEND_TEXT: Color = (38, 38, 38)
LEGEND_MUTED: Color = (120, 120, 120)
MAX_LEGEND_ENTRIES = 24
"""Classes that the legend lists; the smaller ones become one entry."""


def is_background(name: str) -> bool:
    """Whether a class is the background, which is not tinted and greyed in the legend."""
    return name.strip().lower() in ("background", "_background_", "bg")


def percent(share: float) -> str:
    """Return a share in 0...1 as text with one decimal; a share above 0 is never shown as 0, one below 1 never as 100.

    >>> percent(0.3117), percent(0.0002), percent(1.0)
    ('31.2 %', '<0.1 %', '100 %')
    """
    if share >= 0.9995:
        return "100 %" if share >= 1 else ">99.9 %"
    return f"{100 * share:.1f} %" if share >= 0.0005 else "<0.1 %"


def areas_summary(found: Sequence[ClassArea]) -> str:
    """Return the five largest areas with their shares, and the sum of the others, as one line for a terminal."""
    shares = [f"{area.name} {percent(area.share)}" for area in found[:5]]
    if len(found) > 5:
        shares.append(f"{len(found) - 5} more {percent(sum(area.share for area in found[5:]))}")
    return ", ".join(shares)


def blend(image_HWC: Pixels, labels_HW: Labels, classes: Sequence[str], palette: Sequence[Color], alpha: float = 0.5) -> Pixels:
    """Return an image tinted with each pixel's class colour and outlined where classes meet; background is not tinted.

    Args:
        image_HWC: RGB uint8, H x W x 3.
        labels_HW: Class numbers, H x W.
        classes: Class names.
        palette: One (red, green, blue) per class.
        alpha: Weight of the colour, 0 (image and outlines only) to 1 (colours only).

    Returns:
        RGB uint8, H x W x 3.

    Raises:
        UsageError: `alpha` is outside 0...1.
    """
    if not 0 <= alpha <= 1:
        raise UsageError(f"alpha must be from 0 (image only) to 1 (colours only), not {alpha!r}.")
    tints = np.array([0 if is_background(name) else round(256 * alpha) for name in classes], np.uint32)
    colors = np.array(palette, np.uint32).reshape(-1, 3)
    tinted = image_HWC.copy()
    outline = _outline(labels_HW)
    # in bands: the arithmetic needs 32 bits a value, several times the size of the image
    step = max(1, 2**20 // image_HWC.shape[1])
    for top in range(0, image_HWC.shape[0], step):
        rows = slice(top, top + step)
        tint_HW1 = tints[labels_HW[rows]][..., None]
        tinted[rows] = (image_HWC[rows] * (256 - tint_HW1) + colors[labels_HW[rows]] * tint_HW1 + 128) >> 8
    tinted[outline] = (tinted[outline].astype(np.uint16) * 2 + 3 * 255 + 2) // 5  # 60 % white: visible on any class
    return tinted


def _outline(labels_HW: Labels) -> Mask:
    """Mark the borders between classes, as wide as 1/500 of the image's shorter side, at least one pixel."""
    edge = np.zeros(labels_HW.shape, np.bool_)
    edge[:, 1:] |= labels_HW[:, 1:] != labels_HW[:, :-1]
    edge[1:] |= labels_HW[1:] != labels_HW[:-1]
    for _ in range(round(min(labels_HW.shape) / 500) - 1):
        thicker = edge.copy()
        thicker[1:] |= edge[:-1]
        thicker[:, 1:] |= edge[:, :-1]
        edge = thicker
    return edge


def with_legend(image: Image.Image, areas: Sequence[ClassArea], palette: Sequence[Color]) -> Image.Image:
    """Return an image with a legend below it: swatch, name and share of each class.

    Text grows with the image and is never smaller than 12 pixels; an image narrower than its legend is centred on a wide sheet.

    Args:
        image: RGB image.
        areas: Classes to list, largest first.
        palette: One (red, green, blue) per class.
    """
    size = max(12, round(0.024 * (image.width * image.height) ** 0.5))
    font = ImageFont.load_default(size=size)
    entries = _legend_entries(areas, palette)
    widths = [(font.getlength(_short_class_name(name)), font.getlength(percent(share))) for name, share, _ in entries]
    gap, line, margin, between = round(0.6 * size), round(1.6 * size), size, 2 * size
    # as many columns as fit beside each other, each as wide as its widest entry: swatch, name, share
    for rows in range(1, len(entries) + 1):
        columns = [range(first, min(first + rows, len(entries))) for first in range(0, len(entries), rows)]
        cells = [size + 2 * gap + sum(round(max(widths[k][part] for k in column)) for part in (0, 1)) for column in columns]
        legend_width = 2 * margin + sum(cells) + between * (len(cells) - 1)
        if legend_width <= image.width:
            break
    sheet = Image.new(
        "RGB", (max(image.width, legend_width), image.height + 2 * margin + rows * line - (line - size)), LEGEND_BACKGROUND
    )
    sheet.paste(image, ((sheet.width - image.width) // 2, 0))
    draw = ImageDraw.Draw(sheet)
    left = margin
    for column, cell in zip(columns, cells, strict=True):
        for row, k in enumerate(column):
            name, share, color = entries[k]
            top = image.height + margin + row * line
            box = (left, top, left + size - 1, top + size - 1)
            draw.rounded_rectangle(
                box, size // 6, fill=color or LEGEND_BACKGROUND, outline=color or LEGEND_MUTED, width=max(1, size // 14)
            )
            ink = LEGEND_TEXT if color else LEGEND_MUTED
            draw.text((left + size + gap, top + size // 2), _short_class_name(name), ink, font, anchor="lm")
            draw.text((left + cell, top + size // 2), percent(share), ink, font, anchor="rm")
        left += cell + between
    return sheet


def _legend_entries(areas: Sequence[ClassArea], palette: Sequence[Color]) -> list[tuple[str, float, Color | None]]:
    """Return name, share and swatch colour of each legend entry, background last; the smallest beyond the limit become one."""
    ordered = sorted(areas, key=lambda area: is_background(area.name))
    entries = [(one.name, one.share, None if is_background(one.name) else palette[one.index]) for one in ordered]
    if len(entries) <= MAX_LEGEND_ENTRIES:
        return entries
    rest = entries[MAX_LEGEND_ENTRIES - 1 :]
    return [*entries[: MAX_LEGEND_ENTRIES - 1], (f"{len(rest)} more", sum(share for _, share, _ in rest), None)]


def _short_class_name(name: str) -> str:
    """Return the first of several synonyms (`wall;brick;partition`), at most 24 characters of it."""
    first = name.split(";")[0].split(",")[0].strip()
    return first if len(first) <= 24 else first[:23].rstrip() + "…"
