"""Masks of every wrong kind, and right ones that look odd, for a folder of three classes; with what has to be said of each."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from image_attacks import png, saved, tiff
from image_bombs import gigapixels
from PIL import Image

HW = (24, 32)
CLASSES = ("ground", "square", "disc")
LABELS = np.zeros(HW, np.uint8)
LABELS[4:12, 4:16] = 1
LABELS[12:20, 16:30] = 2
LABELS[20:] = 255
NUMBERS = np.where(LABELS == 255, 2, LABELS)
"""The labels without void, for files that hold few values."""


@dataclass(frozen=True)
class Mask:
    """A file for the place of a mask."""

    write: Callable[[Path], object]
    """Writes it to a path that ends in .png, or leaves none there."""
    words: str | None = None
    """In the sentence that refuses it (a pattern); None where it is a right mask."""
    labels: np.ndarray | None = None
    """What a right one holds."""


def write_folder(root: Path) -> Path:
    """Write a sound data set of two splits."""
    random_ = np.random.default_rng(0)
    for split in ("train", "val"):
        for kind in ("images", "masks"):
            (root / split / kind).mkdir(parents=True)
        for number in range(2):
            photo = random_.integers(0, 256, (*HW, 3), np.uint8)
            Image.fromarray(photo).save(root / split / "images" / f"{split}{number}.png")
            Image.fromarray(LABELS).save(root / split / "masks" / f"{split}{number}.png")
    (root / "classes.txt").write_text("\n".join(CLASSES) + "\n")
    return root


def packed(numbers_HW: np.ndarray, bits: int) -> bytes:
    """A grey PNG of 1, 2 or 4 bits, as optimisers write it."""
    rows = []
    for row in numbers_HW:
        each = (row[:, None] >> np.arange(bits - 1, -1, -1)) & 1
        rows.append(b"\0" + np.packbits(each.astype(np.uint8).ravel()).tobytes())
    return png(numbers_HW.shape[1], numbers_HW.shape[0], colours=0, bits=bits, data=b"".join(rows))


def _bytes(data: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(data)


def _image(image: Image.Image, kind: str = "PNG", **options: Any) -> Callable[[Path], object]:
    return _bytes(saved(image, kind, **options))


def _with_palette(numbers: np.ndarray) -> Image.Image:
    image = Image.fromarray(numbers)
    image.putpalette([(37 * value) % 256 for value in range(768)])
    return image


def _turned() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


def _frames() -> bytes:
    first, second = _with_palette(NUMBERS), _with_palette(NUMBERS * 0 + 7)
    return saved(first, "GIF", save_all=True, append_images=[second], optimize=False)


def _sixteen_bit_tiff(value: int) -> np.ndarray:
    return np.where(NUMBERS == 1, value, 0).astype(np.uint16)


GREY = Image.fromarray(LABELS)
COLOURS = np.stack([LABELS, np.roll(LABELS, 3), LABELS * 0 + 90], axis=2)

RIGHT: dict[str, Mask] = {
    "grey": Mask(_image(GREY), labels=LABELS),
    "palette": Mask(_image(_with_palette(LABELS)), labels=LABELS),
    "palette with a clear colour": Mask(_image(_with_palette(LABELS), transparency=0), labels=LABELS),
    "three equal channels": Mask(_image(Image.fromarray(np.stack([LABELS] * 3, axis=2))), labels=LABELS),
    "grey and alpha": Mask(_image(Image.fromarray(np.stack([LABELS, LABELS // 2], axis=2))), labels=LABELS),
    "16 bits": Mask(_image(Image.fromarray(LABELS.astype(np.uint16))), labels=LABELS),
    "16 bits in a TIFF": Mask(_bytes(tiff(LABELS.astype(">u2"), byteorder=">")), labels=LABELS),
    "32 bits in a TIFF": Mask(_bytes(tiff(LABELS.astype(np.int32), photometric="minisblack")), labels=LABELS),
    "1 bit": Mask(_bytes(packed(NUMBERS % 2, 1)), labels=NUMBERS % 2),
    "2 bits": Mask(_bytes(packed(NUMBERS, 2)), labels=NUMBERS),
    "4 bits": Mask(_bytes(packed(NUMBERS, 4)), labels=NUMBERS),
    "bmp in a png's name": Mask(_image(GREY, "BMP"), labels=LABELS),
    "first of two frames": Mask(_bytes(_frames()), labels=NUMBERS),
    "all void but beside others": Mask(_image(Image.fromarray(LABELS * 0 + 255)), labels=LABELS * 0 + 255),
}
WRONG: dict[str, Mask] = {
    "colours": Mask(_image(Image.fromarray(COLOURS)), "RGB colours, expected one label number"),
    "colours with alpha": Mask(_image(Image.fromarray(COLOURS).convert("RGBA")), "RGB colours, expected one label number"),
    "four inks": Mask(_image(Image.fromarray(COLOURS).convert("CMYK"), "TIFF"), "mode CMYK"),
    "Lab": Mask(_image(Image.fromarray(COLOURS).convert("LAB"), "TIFF"), "mode LAB"),
    "floats": Mask(_bytes(tiff(LABELS.astype(np.float32))), "mode F"),
    "double floats": Mask(_bytes(tiff(LABELS.astype(np.float64))), "TIFF of a kind that is not read"),
    "white stored as 0 in 16 bits": Mask(_bytes(tiff(LABELS.astype(np.uint16), photometric="miniswhite")), "two ways"),
    "white stored as 0": Mask(_bytes(tiff(LABELS, photometric="miniswhite")), "two ways"),
    "index of no class": Mask(_image(Image.fromarray(np.where(LABELS == 2, 3, LABELS))), "label value 3 .*|classes"),
    "index far above": Mask(_image(Image.fromarray(LABELS * 100)), "label value"),
    "palette index of no class": Mask(_image(_with_palette(np.where(LABELS == 2, 9, LABELS))), "label value 9"),
    "16 bits of instances": Mask(_image(Image.fromarray(_sixteen_bit_tiff(26_001))), "label value 26001"),
    "more than 16 bits": Mask(_bytes(tiff(np.where(LABELS == 1, 70_000, 0).astype(np.int32))), "values from 0 to 70000"),
    "negative": Mask(_bytes(tiff(np.where(LABELS == 1, -1, 0).astype(np.int32))), "values from -1 to 0"),
    "antialiased": Mask(_image(GREY.resize((16, 12), Image.Resampling.BILINEAR).resize(HW[::-1])), "label value"),
    "jpeg": Mask(_image(GREY, "JPEG"), "label value"),
    "webp": Mask(_image(GREY, "WEBP"), "RGB colours|label value"),
    "another size": Mask(_image(GREY.resize((31, 24), Image.Resampling.NEAREST)), r"31 x 24 pixels but its image"),
    "one pixel": Mask(_image(Image.new("L", (1, 1))), r"1 x 1 pixels but its image"),
    "turned": Mask(_image(GREY, exif=_turned()), r"24 x 32 pixels but its image"),
    "gigapixels": Mask(_bytes(gigapixels()["png"]), "more than the limit"),
    "cut short": Mask(_bytes(saved(GREY, "PNG")[:60]), "damaged or cut short"),
    "words": Mask(_bytes(b"ground square disc"), "not an image"),
    "empty": Mask(_bytes(b""), "is empty"),
    "link to nothing": Mask(lambda path: path.symlink_to("nowhere.png"), "is a link to nothing"),
    "missing": Mask(lambda path: None, "without a mask|no mask"),
    "folder": Mask(lambda path: path.mkdir(), "without a mask"),
    "pipe": Mask(lambda path: os.mkfifo(path), "without a mask"),
}
MASKS = {**RIGHT, **WRONG}
