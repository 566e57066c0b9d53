"""Pictures for documents: as JPEG or palette PNG below a number of bytes, so that a repository stays light."""

import io
from pathlib import Path

from PIL import Image

from deeplabzoo.errors import OutputError
from deeplabzoo.files import write_atomically

MAX_IMAGE_BYTES = 150_000
"""Of one picture."""
_QUALITIES = (88, 80, 70, 60)


def write_jpeg(image: Image.Image, path: Path) -> None:
    """Write at the best of four qualities that fits; raises OutputError where none does, or the file cannot be written."""
    for quality in _QUALITIES:
        sink = io.BytesIO()
        image.convert("RGB").save(sink, "JPEG", quality=quality, optimize=True)
        if sink.tell() <= MAX_IMAGE_BYTES:
            write_atomically(path, lambda file, sink=sink: file.write(sink.getvalue()))  # type: ignore[misc]
            return
    raise OutputError(f"'{path}' would have more than {MAX_IMAGE_BYTES // 1000} kB; take a smaller photo.")


def write_png(image: Image.Image, path: Path) -> None:
    """Write a palette picture, which flat areas keep small; raises OutputError as `write_jpeg` does."""
    sink = io.BytesIO()
    image.save(sink, "PNG", optimize=True)
    if sink.tell() > MAX_IMAGE_BYTES:
        raise OutputError(f"'{path}' would have more than {MAX_IMAGE_BYTES // 1000} kB; take a smaller photo.")
    write_atomically(path, lambda file: file.write(sink.getvalue()))
