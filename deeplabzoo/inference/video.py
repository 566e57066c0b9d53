"""A video in, the same video tinted by class out: frame by frame at constant memory, each at its own time, sound kept.

PyAV (FFmpeg's libraries) reads and writes. Of the frames only the one at work is held, so an hour takes the memory of a second.
"""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from tqdm import tqdm

from deeplabzoo.data.image_io import Labels, Pixels
from deeplabzoo.device import eval_mode
from deeplabzoo.errors import ImageError, OutputError, UsageError
from deeplabzoo.files import write_atomically
from deeplabzoo.inference.predictor import Predictor, video_format
from deeplabzoo.inference.visualization import blend
from deeplabzoo.log import logger
from deeplabzoo.optional_imports import require_module
from deeplabzoo.processing.postprocessing import ClassArea, argmax_labels
from deeplabzoo.processing.preprocessing import low_resolution_logits, prepare

# Labels of the frames of a video: each as a photo, or averaged over time so that they do not flicker.


class FrameLabels:
    """Labels of one frame after another, H x W, and the areas of all of them.

    With `smooth` N above 1 the class probabilities are averaged over time, at the resolution of the head's logits:
    the newest frame counts 2 / (N + 1), each older one that much less, so labels flicker less and follow changes N / 2 frames
    late (an exponential moving average whose weights have the mean age of a plain average over N frames). With 0 or 1 a frame
    gets what the predictor says of it as a photo. Raises UsageError for a negative N, or for N with frames that are cut into
    tiles.
    """

    def __init__(self, predictor: Predictor, hw: tuple[int, int], smooth: int = 0) -> None:
        self._in_tiles = predictor.tiling_for(hw) is not None
        if smooth < 0:
            raise UsageError(f"smooth must be 0 (each frame alone) or the number of frames to average over, not {smooth}.")
        if smooth > 1 and self._in_tiles:
            raise UsageError("Smoothing does not go with tiles: leave one of them out (predict --smooth, --tile).")
        self.predictor = predictor
        self._newest = 2 / (smooth + 1) if smooth > 1 else 1.0
        self._mean_1CHW: torch.Tensor | None = None
        self._counts = np.zeros(len(predictor.net.classes), np.int64)

    def __call__(self, image_HWC: Pixels) -> Labels:
        """Return the labels of the next frame."""
        labels_HW = self.predictor(image_HWC).labels if self._in_tiles else self._predict_whole(image_HWC)
        self._counts += np.bincount(labels_HW.ravel(), minlength=len(self._counts))
        return labels_HW

    def areas(self) -> tuple[ClassArea, ...]:
        """Return the classes that occurred, counted over every pixel of every frame so far, largest first."""
        order = sorted(np.flatnonzero(self._counts).tolist(), key=lambda index: -int(self._counts[index]))
        counts, total = self._counts, int(self._counts.sum())
        names = self.predictor.net.classes
        return tuple(ClassArea(index, names[index], int(counts[index]), int(counts[index]) / total) for index in order)

    def _predict_whole(self, image_HWC: Pixels) -> Labels:
        net = self.predictor.form()
        with eval_mode(net):
            low_1CHW, grid = low_resolution_logits(net, prepare(image_HWC, net.preprocessing))
            if self._newest == 1:
                return argmax_labels(low_1CHW, grid)
            now_1CHW = low_1CHW.float().softmax(dim=1)
            self._mean_1CHW = now_1CHW if self._mean_1CHW is None else self._mean_1CHW.lerp(now_1CHW, self._newest)
            # The log of one frame's probabilities is its logits but for a constant, so a still picture keeps its labels.
            return argmax_labels(self._mean_1CHW.clamp_min(torch.finfo(torch.float32).tiny).log(), grid)


# Opening a video that may be hostile: as a video and nothing else, and no frame larger than was allowed.


MAX_PIXELS = 2**26
"""Default limit on the pixels of a frame: 8192 x 8192."""
_SAFE_OPTIONS = {
    "protocol_whitelist": "file",
    "format_whitelist": "mov,mp4,matroska,webm,avi,mpeg,mpegvideo,mpegts,asf,flv,ogg",
}
"""What FFmpeg may open: this file as a video. Playlists, which make it open other files and addresses, are none."""


@dataclass(frozen=True)
class FrameGeometry:
    """What the first frame tells: its size as stored, and the quarter turns, counter-clockwise, that make it upright."""

    stored_hw: tuple[int, int]
    quarter_turns: int

    @property
    def upright_hw(self) -> tuple[int, int]:
        """Height and width in pixels as shown."""
        height, width = self.stored_hw
        return (width, height) if self.quarter_turns % 2 else (height, width)


def probe_video(av: Any, source: Path, max_pixels: int) -> FrameGeometry:
    """Return the shape of a video's first frame; raises ImageError if there is none, or it has more than `max_pixels`."""
    if os.path.exists(source) and not os.path.isfile(source):
        raise ImageError(f"'{source}' is no file, expected a video.")  # a pipe would be waited for
    with ffmpeg_errors(av, source), open_container(av, source) as reading:
        if not reading.streams.video:
            raise ImageError(f"'{source}' holds no pictures; expected a video such as MP4, MOV, MKV or WebM.")
        context = reading.streams.video[0].codec_context
        if context is None:
            raise ImageError(f"'{source}' is written in a code that FFmpeg does not know; expected one such as H.264 or VP9.")
        _require_pixel_limit(source, context.width, context.height, max_pixels)  # before a frame takes its memory
        for frame in reading.decode(reading.streams.video[0]):
            _require_pixel_limit(source, frame.width, frame.height, max_pixels)
            return FrameGeometry((frame.height, frame.width), round(frame.rotation / 90))
    raise ImageError(f"'{source}' holds not one frame that can be decoded; it may have been cut short.")


def open_container(av: Any, source: Path) -> Any:
    """Return PyAV's container of a file, by its absolute path: no name is taken for an address then."""
    return av.open(str(source.absolute()), container_options=_SAFE_OPTIONS)


@contextmanager
def ffmpeg_errors(av: Any, source: Path) -> Iterator[None]:
    """Turn what FFmpeg says of a damaged file into an ImageError."""
    try:
        yield
    except FileNotFoundError:
        raise ImageError(f"'{source}' does not exist; check the path.") from None
    except av.error.ArgumentError:  # what is not on the list of formats, among others
        raise ImageError(f"'{source}' cannot be read as a video; expected one such as MP4, MOV, MKV, WebM or AVI.") from None
    except (av.error.FFmpegError, UnicodeError) as error:
        raise ImageError(f"'{source}' cannot be read as a video: {ffmpeg_reason(error)}.") from None


def ffmpeg_reason(error: BaseException) -> str:
    """Return what an exception of FFmpeg says, in one line without a full stop."""
    text = str(getattr(error, "strerror", None) or error).strip().split("\n")[0].rstrip(".")
    return text or type(error).__name__


def _require_pixel_limit(source: Path, width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise ImageError(
            f"'{source}' declares frames of {width} x {height} pixels, more than the limit of {max_pixels}; "
            "set a larger max_pixels (predict --max-pixels) if you trust it."
        )


_OPTIONS = {"libx264": {"crf": "18"}, "libvpx-vp9": {"crf": "24", "b": "0", "deadline": "realtime", "cpu-used": "6"}}
"""Settings of the encoders at which colours and outlines look as they do in a picture."""
_BT709, _LIMITED = 1, 1
"""How colours are stored: ITU-R BT.709 in the limited range, which players expect (ISO/IEC 23091-2)."""
_DEFAULT_FRAME_RATE = Fraction(25)


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
    av = require_module("av", extra="video", purpose="labelling a video")
    shape = probe_video(av, source, predictor.max_pixels or MAX_PIXELS)
    labels = FrameLabels(predictor, shape.upright_hw, smooth)
    start = time.perf_counter()
    frames, sound = 0, False

    def write(file: BinaryIO) -> None:
        nonlocal frames, sound
        try:
            with av.open(file, "w", format=container) as writing:
                frames, sound = _transcode(av, source, shape, writing, codec, labels, alpha)
        except av.error.FFmpegError as error:
            raise OutputError(f"Cannot write '{out}': {ffmpeg_reason(error)}.") from None

    write_atomically(out, write)
    height, width = shape.upright_hw
    return VideoResult(frames, width, height, labels.areas(), sound, time.perf_counter() - start)


def _transcode(
    av: Any, source: Path, shape: FrameGeometry, writing: Any, codec: str, labels: FrameLabels, alpha: float
) -> tuple[int, bool]:
    """Label and write every frame and copy the sound; returns the number of frames and whether there was sound."""
    with ffmpeg_errors(av, source):
        reading = open_container(av, source)
    with reading:
        video = reading.streams.video[0]
        video.thread_type = "AUTO"
        stream = _video_stream(writing, codec, video, shape)
        sound, sound_out = _audio_streams(reading, writing, source)
        times = _FrameTimestamps(video)
        frames = 0
        with tqdm(total=_expected_frames(video), unit="frame", desc=source.name, disable=None, dynamic_ncols=True) as bar:
            for part in _demux(av, source, reading, video, sound):
                if isinstance(part, av.Packet):
                    part.stream = sound_out
                    writing.mux(part)
                    continue
                image_HWC = _to_upright_rgb(part, shape)
                net = labels.predictor.net
                shown_HWC = blend(image_HWC, labels(image_HWC), net.classes, net.palette, alpha)
                picture = av.VideoFrame.from_ndarray(_pad_to_even(shown_HWC), format="rgb24")
                picture = picture.reformat(format="yuv420p", dst_colorspace=_BT709, dst_color_range=_LIMITED)
                picture.pts, picture.time_base = times.of(part), video.time_base
                picture.duration = part.duration
                writing.mux(stream.encode(picture))
                frames += 1
                bar.update()
        writing.mux(stream.encode(None))
    return frames, sound is not None


def _video_stream(writing: Any, codec: str, video: Any, shape: FrameGeometry) -> Any:
    """Return the stream to write: the source's clock, rate and pixel form, and the upright size made even."""
    stream = writing.add_stream(
        codec, rate=video.average_rate or video.guessed_rate or _DEFAULT_FRAME_RATE, options=_OPTIONS[codec]
    )
    height, width = shape.upright_hw
    stream.width, stream.height, stream.pix_fmt = width + width % 2, height + height % 2, "yuv420p"
    if (stream.width, stream.height) != (width, height):
        logger.info(
            f"the video is written as {stream.width} x {stream.height}: encoders need even sides, not {width} x {height}"
        )
    context = stream.codec_context
    context.time_base = stream.time_base = video.time_base
    context.colorspace = context.color_primaries = context.color_trc = _BT709
    context.color_range = _LIMITED
    ratio = video.sample_aspect_ratio
    if ratio:
        context.sample_aspect_ratio = 1 / ratio if shape.quarter_turns % 2 else ratio
    return stream


def _audio_streams(reading: Any, writing: Any, source: Path) -> tuple[Any, Any]:
    """Return the sound to copy and the stream that takes it, or None twice where there is none that the container takes."""
    if not reading.streams.audio:
        return None, None
    sound = reading.streams.audio[0]
    if sound.codec_context.codec.canonical_name not in writing.supported_codecs:
        logger.info(
            f"{source.name}: the sound ({sound.codec_context.name}) does not go into .{writing.format.name}; it is left out"
        )
        return None, None
    return sound, writing.add_stream_from_template(sound)


def _demux(av: Any, source: Path, reading: Any, video: Any, sound: Any) -> Iterator[Any]:
    """Yield decoded frames and packets of sound in the order of the file."""
    packets = reading.demux([video] if sound is None else [video, sound])
    while True:
        with ffmpeg_errors(av, source):
            packet = next(packets, None)
            if packet is None:
                return
            parts = packet.decode() if packet.stream is video else [packet] if packet.dts is not None else []
        yield from parts


class _FrameTimestamps:
    """When each frame is shown, in the source's units: as the file says, and by the rate where it does not; always rising."""

    def __init__(self, video: Any) -> None:
        self._step = max(1, round(1 / ((video.average_rate or video.guessed_rate or _DEFAULT_FRAME_RATE) * video.time_base)))
        self._last: int | None = None

    def of(self, frame: Any) -> int:
        """Return the time of the next frame."""
        told, last = frame.pts, self._last
        now = int(told) if told is not None else 0 if last is None else last + self._step
        self._last = now if last is None else max(now, last + 1)
        return self._last


def _to_upright_rgb(frame: Any, shape: FrameGeometry) -> Pixels:
    """Return the frame as RGB, turned as the file asks; one of another size than the first is brought to that."""
    height, width = shape.stored_hw
    image_HWC: Pixels = frame.to_ndarray(format="rgb24", width=width, height=height)
    return np.ascontiguousarray(np.rot90(image_HWC, shape.quarter_turns)) if shape.quarter_turns else image_HWC


def _pad_to_even(image_HWC: Pixels) -> Pixels:
    height, width = image_HWC.shape[:2]
    return np.pad(image_HWC, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge") if height % 2 or width % 2 else image_HWC


def _expected_frames(video: Any) -> int | None:
    if video.frames:
        return int(video.frames)
    known = video.duration and video.time_base and video.average_rate
    return round(video.duration * video.time_base * video.average_rate) if known else None
