"""Opening a video that may be hostile: as a video and nothing else, and no frame larger than was allowed."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deeplabzoo.errors import ImageError

MAX_PIXELS = 2**26
"""Default limit on the pixels of a frame: 8192 x 8192."""
_HARMLESS = {
    "protocol_whitelist": "file",
    "format_whitelist": "mov,mp4,matroska,webm,avi,mpeg,mpegvideo,mpegts,asf,flv,ogg",
}
"""What FFmpeg may open: this file as a video. Playlists, which make it open other files and addresses, are none."""


@dataclass(frozen=True)
class Shape:
    """What the first frame tells: its size as stored, and the quarter turns, counter-clockwise, that make it upright."""

    stored_hw: tuple[int, int]
    quarter_turns: int

    @property
    def upright_hw(self) -> tuple[int, int]:
        """Height and width in pixels as shown."""
        height, width = self.stored_hw
        return (width, height) if self.quarter_turns % 2 else (height, width)


def look(av: Any, source: Path, max_pixels: int) -> Shape:
    """Return the shape of a video's first frame; raises ImageError if there is none, or it has more than `max_pixels`."""
    if os.path.exists(source) and not os.path.isfile(source):
        raise ImageError(f"'{source}' is no file, expected a video.")  # a pipe would be waited for
    with reading_from(av, source), opened(av, source) as reading:
        if not reading.streams.video:
            raise ImageError(f"'{source}' holds no pictures; expected a video such as MP4, MOV, MKV or WebM.")
        context = reading.streams.video[0].codec_context
        if context is None:
            raise ImageError(f"'{source}' is written in a code that FFmpeg does not know; expected one such as H.264 or VP9.")
        _require_small(source, context.width, context.height, max_pixels)  # before a frame takes its memory
        for frame in reading.decode(reading.streams.video[0]):
            _require_small(source, frame.width, frame.height, max_pixels)
            return Shape((frame.height, frame.width), round(frame.rotation / 90))
    raise ImageError(f"'{source}' holds not one frame that can be decoded; it may have been cut short.")


def opened(av: Any, source: Path) -> Any:
    """Return PyAV's container of a file, by its absolute path: no name is taken for an address then."""
    return av.open(str(source.absolute()), container_options=_HARMLESS)


@contextmanager
def reading_from(av: Any, source: Path) -> Iterator[None]:
    """Turn what FFmpeg says of a damaged file into an ImageError."""
    try:
        yield
    except FileNotFoundError:
        raise ImageError(f"'{source}' does not exist; check the path.") from None
    except av.error.ArgumentError:  # what is not on the list of formats, among others
        raise ImageError(f"'{source}' cannot be read as a video; expected one such as MP4, MOV, MKV, WebM or AVI.") from None
    except (av.error.FFmpegError, UnicodeError) as error:
        raise ImageError(f"'{source}' cannot be read as a video: {reason(error)}.") from None


def reason(error: BaseException) -> str:
    """Return what an exception of FFmpeg says, in one line without a full stop."""
    text = str(getattr(error, "strerror", None) or error).strip().split("\n")[0].rstrip(".")
    return text or type(error).__name__


def _require_small(source: Path, width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise ImageError(
            f"'{source}' declares frames of {width} x {height} pixels, more than the limit of {max_pixels}; "
            "set a larger max_pixels (predict --max-pixels) if you trust it."
        )
