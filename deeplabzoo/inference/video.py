"""A video in, the same video tinted by class out: frame by frame at constant memory, each at its own time, sound kept.

PyAV (FFmpeg's libraries) reads and writes. Of the frames only the one at work is held, so an hour takes the memory of a second.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from tqdm import tqdm

from deeplabzoo.data.images import Pixels
from deeplabzoo.errors import OutputError, UsageError
from deeplabzoo.inference.formats import video_format
from deeplabzoo.inference.labels import ClassArea
from deeplabzoo.inference.optional import require
from deeplabzoo.inference.overlay import blend
from deeplabzoo.inference.predictor import Predictor
from deeplabzoo.inference.video_labels import FrameLabels
from deeplabzoo.inference.video_source import MAX_PIXELS, Shape, look, opened, reading_from, reason
from deeplabzoo.output import write_atomically
from deeplabzoo.say import say

_OPTIONS = {"libx264": {"crf": "18"}, "libvpx-vp9": {"crf": "24", "b": "0", "deadline": "realtime", "cpu-used": "6"}}
"""Settings of the encoders at which colours and outlines look as they do in a picture."""
_BT709, _LIMITED = 1, 1
"""How colours are stored: ITU-R BT.709 in the limited range, which players expect (ISO/IEC 23091-2)."""
_UNKNOWN_RATE = Fraction(25)


@dataclass(frozen=True)
class VideoResult:
    """What was found in a video, summed over its frames; width and height are those of the upright picture, in pixels."""

    frames: int
    width: int
    height: int
    areas: tuple[ClassArea, ...]
    sound: bool
    """Whether sound was copied."""
    seconds: float

    def found(self) -> list[ClassArea]:
        """Return the classes that occur with their pixels and share of all frames, largest first."""
        return list(self.areas)


def label_video(
    predictor: Predictor, source: str | Path, out: str | Path, *, alpha: float = 0.5, smooth: int = 0
) -> VideoResult:
    """Write `source` as a video whose frames are tinted by class, whole or not at all, with a progress bar on a terminal.

    Frames keep their times, also where the rate varies; rotation that the file asks for is applied; sound is copied as it is.
    Odd sides gain one row or column, as encoders take pairs of pixels. `smooth` averages the probabilities of the last frames
    (see `FrameLabels`); 0 labels each frame as a photo. Containers to write: .mp4, .m4v, .mov, .mkv (H.264), .webm (VP9).

    Raises ImageError for what is no video or is damaged, OutputError, UsageError for settings that make no sense, and
    DeepLabZooError without PyAV (`pip install "deeplabzoo[video]"`).
    """
    source, out = Path(source), Path(out)
    container, codec = video_format(out)
    if not 0 <= alpha <= 1:
        raise UsageError(f"alpha must be from 0 (video only) to 1 (colours only), not {alpha!r}.")
    if out.exists() and source.exists() and out.samefile(source):
        raise UsageError(f"The result '{out}' would overwrite the video; name another.")
    av = require("av", extra="video", purpose="labelling a video")
    shape = look(av, source, predictor.max_pixels or MAX_PIXELS)
    labels = FrameLabels(predictor, shape.upright_hw, smooth)
    start = time.perf_counter()
    frames, sound = 0, False

    def write(file: BinaryIO) -> None:
        nonlocal frames, sound
        try:
            with av.open(file, "w", format=container) as writing:
                frames, sound = _transcode(av, source, shape, writing, codec, labels, alpha)
        except av.error.FFmpegError as error:
            raise OutputError(f"Cannot write '{out}': {reason(error)}.") from None

    write_atomically(out, write)
    height, width = shape.upright_hw
    return VideoResult(frames, width, height, labels.areas(), sound, time.perf_counter() - start)


def _transcode(
    av: Any, source: Path, shape: Shape, writing: Any, codec: str, labels: FrameLabels, alpha: float
) -> tuple[int, bool]:
    """Label and write every frame and copy the sound; returns the number of frames and whether there was sound."""
    with reading_from(av, source):
        reading = opened(av, source)
    with reading:
        video = reading.streams.video[0]
        video.thread_type = "AUTO"
        stream = _video_stream(writing, codec, video, shape)
        sound, sound_out = _sound(reading, writing, source)
        times = _Times(video)
        frames = 0
        with tqdm(total=_expected_frames(video), unit="frame", desc=source.name, disable=None, dynamic_ncols=True) as bar:
            for part in _parts(av, source, reading, video, sound):
                if isinstance(part, av.Packet):
                    part.stream = sound_out
                    writing.mux(part)
                    continue
                image_HWC = _upright(part, shape)
                net = labels.predictor.net
                shown_HWC = blend(image_HWC, labels(image_HWC), net.classes, net.palette, alpha)
                picture = av.VideoFrame.from_ndarray(_even(shown_HWC), format="rgb24")
                picture = picture.reformat(format="yuv420p", dst_colorspace=_BT709, dst_color_range=_LIMITED)
                picture.pts, picture.time_base = times.of(part), video.time_base
                picture.duration = part.duration
                writing.mux(stream.encode(picture))
                frames += 1
                bar.update()
        writing.mux(stream.encode(None))
    return frames, sound is not None


def _video_stream(writing: Any, codec: str, video: Any, shape: Shape) -> Any:
    """Return the stream to write: the source's clock, rate and pixel form, and the upright size made even."""
    stream = writing.add_stream(codec, rate=video.average_rate or video.guessed_rate or _UNKNOWN_RATE, options=_OPTIONS[codec])
    height, width = shape.upright_hw
    stream.width, stream.height, stream.pix_fmt = width + width % 2, height + height % 2, "yuv420p"
    if (stream.width, stream.height) != (width, height):
        say(f"the video is written as {stream.width} x {stream.height}: encoders need even sides, not {width} x {height}")
    context = stream.codec_context
    context.time_base = stream.time_base = video.time_base
    context.colorspace = context.color_primaries = context.color_trc = _BT709
    context.color_range = _LIMITED
    ratio = video.sample_aspect_ratio
    if ratio:
        context.sample_aspect_ratio = 1 / ratio if shape.quarter_turns % 2 else ratio
    return stream


def _sound(reading: Any, writing: Any, source: Path) -> tuple[Any, Any]:
    """Return the sound to copy and the stream that takes it, or None twice where there is none that the container takes."""
    if not reading.streams.audio:
        return None, None
    sound = reading.streams.audio[0]
    if sound.codec_context.codec.canonical_name not in writing.supported_codecs:
        say(f"{source.name}: the sound ({sound.codec_context.name}) does not go into .{writing.format.name}; it is left out")
        return None, None
    return sound, writing.add_stream_from_template(sound)


def _parts(av: Any, source: Path, reading: Any, video: Any, sound: Any) -> Iterator[Any]:
    """Yield decoded frames and packets of sound in the order of the file."""
    packets = reading.demux([video] if sound is None else [video, sound])
    while True:
        with reading_from(av, source):
            packet = next(packets, None)
            if packet is None:
                return
            parts = packet.decode() if packet.stream is video else [packet] if packet.dts is not None else []
        yield from parts


class _Times:
    """When each frame is shown, in the source's units: as the file says, and by the rate where it does not; always rising."""

    def __init__(self, video: Any) -> None:
        self._step = max(1, round(1 / ((video.average_rate or video.guessed_rate or _UNKNOWN_RATE) * video.time_base)))
        self._last: int | None = None

    def of(self, frame: Any) -> int:
        """Return the time of the next frame."""
        told, last = frame.pts, self._last
        now = int(told) if told is not None else 0 if last is None else last + self._step
        self._last = now if last is None else max(now, last + 1)
        return self._last


def _upright(frame: Any, shape: Shape) -> Pixels:
    """Return the frame as RGB, turned as the file asks; one of another size than the first is brought to that."""
    height, width = shape.stored_hw
    image_HWC: Pixels = frame.to_ndarray(format="rgb24", width=width, height=height)
    return np.ascontiguousarray(np.rot90(image_HWC, shape.quarter_turns)) if shape.quarter_turns else image_HWC


def _even(image_HWC: Pixels) -> Pixels:
    height, width = image_HWC.shape[:2]
    return np.pad(image_HWC, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge") if height % 2 or width % 2 else image_HWC


def _expected_frames(video: Any) -> int | None:
    if video.frames:
        return int(video.frames)
    known = video.duration and video.time_base and video.average_rate
    return round(video.duration * video.time_base * video.average_rate) if known else None
