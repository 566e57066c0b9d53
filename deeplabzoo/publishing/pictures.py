"""Two small pictures for a model card: a prediction laid over a photo, and the curves of the run."""

from pathlib import Path

import numpy as np
from PIL import Image

from deeplabzoo.data.images import Pixels, read_image
from deeplabzoo.inference.predictor import Predictor
from deeplabzoo.models.deeplab import DeepLab
from deeplabzoo.output import write_atomically

_LONGEST_PX = 720
_COLOURS = 48


def small_photo(source: Path | Pixels) -> Pixels:
    """Read a photo and shrink it to 720 pixels at most; raises ImageError."""
    picture = Image.fromarray(read_image(source))
    picture.thumbnail((_LONGEST_PX, _LONGEST_PX), Image.Resampling.LANCZOS)
    return np.asarray(picture)


def draw_overlay(net: DeepLab, photo: Pixels, path: Path) -> None:
    """Write the prediction over a photo, with its legend, as JPEG; raises OutputError."""
    picture = Predictor(net, device="cpu")(photo).overlay().convert("RGB")
    write_atomically(path, lambda file: picture.save(file, format="JPEG", quality=88))


def copy_curves(source: Path, path: Path) -> bool:
    """Copy the curves of a run in few colours, a third of the bytes; False where the run drew none."""
    if not source.is_file():
        return False
    with Image.open(source) as whole:
        few = whole.convert("RGB").quantize(_COLOURS, dither=Image.Dither.NONE)
    write_atomically(path, lambda file: few.save(file, format="PNG", optimize=True))
    return True
