"""Photos and masks in the layout of PASCAL VOC, drawn from a seed: a benchmark of training needs no data set for its speed.

What decides the time of reading and augmenting a picture is its size in pixels and in bytes, so these have VOC's: 500 pixels on
the longer side, and enough fine detail that a JPEG of them weighs about what VOC's photos weigh, 90 kB.
"""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from deeplabzoo.data.classes import CLASS_LISTS

_SIZES_WH = ((500, 375), (500, 333), (375, 500), (500, 375))
_VOID = 255
_DETAIL = 19.0
"""Standard deviation of the fine detail, in grey levels: it sets the weight of the JPEG."""


def write_photos(root: Path, *, train: int, val: int, seed: int, longest: int = 500) -> None:
    """Write `train` + `val` photos with masks below `root`/VOCdevkit/VOC2012; `longest` is their longer side in pixels."""
    home = root / "VOCdevkit" / "VOC2012"
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (home / folder).mkdir(parents=True, exist_ok=True)
    colours = np.zeros((256, 3), np.uint8)
    colours[:21] = CLASS_LISTS["voc"].palette
    colours[_VOID] = (224, 224, 192)
    names = [f"made_{number:06d}" for number in range(train + val)]
    for number, name in enumerate(names):
        rng = np.random.default_rng([seed, number])
        width, height = (max(1, round(side * longest / 500)) for side in _SIZES_WH[number % len(_SIZES_WH)])
        photo, mask = _drawn(rng, (width, height))
        mask.putpalette(colours.tobytes())
        photo.save(home / "JPEGImages" / f"{name}.jpg", quality=90)
        mask.save(home / "SegmentationClass" / f"{name}.png")
    for split, stems in (("train", names[:train]), ("val", names[train:])):
        (home / "ImageSets" / "Segmentation" / f"{split}.txt").write_text("".join(f"{stem}\n" for stem in stems))


def _drawn(rng: np.random.Generator, size_wh: tuple[int, int]) -> tuple[Image.Image, Image.Image]:
    """Return a photo and its mask: soft ground, two to four objects with void rims, fine detail over everything."""
    width, height = size_wh
    photo = Image.fromarray(rng.integers(40, 216, (9, 12, 3), np.uint8)).resize(size_wh, Image.Resampling.BICUBIC)
    mask = Image.new("P", size_wh, 0)
    on_photo, on_mask = ImageDraw.Draw(photo), ImageDraw.Draw(mask)
    for _ in range(int(rng.integers(2, 5))):
        left, top = int(rng.integers(0, max(1, width // 2))), int(rng.integers(0, max(1, height // 2)))
        right, bottom = left + int(rng.integers(width // 5, width // 2)), top + int(rng.integers(height // 5, height // 2))
        colour = tuple(int(value) for value in rng.integers(0, 256, 3))
        on_photo.ellipse((left, top, right, bottom), fill=colour)
        on_mask.ellipse((left, top, right, bottom), fill=int(rng.integers(1, 21)), outline=_VOID, width=max(1, width // 100))
    detail = rng.normal(0.0, _DETAIL, (height, width, 1))
    pixels = np.clip(np.asarray(photo, np.float64) + detail, 0, 255).astype(np.uint8)
    return Image.fromarray(pixels), mask
