"""Videos tinted by class, frame by frame in constant memory; timestamps and sound are kept.

PyAV (FFmpeg's libraries) reads and writes. Only one frame is held at a time.
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
from deeplabzoo.inference.inputs import video_format
from deeplabzoo.inference.predictor import Predictor
from deeplabzoo.inference.visualization import blend
from deeplabzoo.log import logger
from deeplabzoo.optional_imports import require_module
from deeplabzoo.processing.postprocessing import ClassArea, areas_from_counts, argmax_labels, count_pixels
from deeplabzoo.processing.preprocessing import low_resolution_logits


class FrameLabels:
    """Labels of one frame after another, optionally averaged over time against flicker, and the areas of all frames.

    Args:
        predictor: The model.
        hw: Height and width of the frames, in pixels.
        smooth: Number N of frames to average over; 0 or 1 labels each frame like a single image. Class probabilities are
            averaged at the resolution of the head's logits: the newest frame has the weight 2 / (N + 1), and the others decay
            exponentially (an EMA with the mean age of a plain average over N frames), so labels follow changes N / 2 frames
            late.

    Raises:
        UsageError: `smooth` is negative, or above 1 with frames that are cut into tiles.
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
        """Return the labels, H x W, of the next frame, H x W x 3 RGB uint8."""
        labels_HW = self.predictor(image_HWC).labels if self._in_tiles else self._predict_whole(image_HWC)
        self._counts += count_pixels(labels_HW, len(self._counts))
        return labels_HW

    def areas(self) -> tuple[ClassArea, ...]:
        """Return the classes that occurred, counted over every pixel of every frame so far, largest first."""
        return tuple(areas_from_counts(self._counts, self.predictor.net.classes))

    def _predict_whole(self, image_HWC: Pixels) -> Labels:
        net = self.predictor.current_model()
        with eval_mode(net):
            low_1CHW, grid = low_resolution_logits(net, self.predictor.prepare(image_HWC))
            if self._newest == 1:
                return argmax_labels(low_1CHW, grid)
            now_1CHW = low_1CHW.float().softmax(dim=1)
            self._mean_1CHW = now_1CHW if self._mean_1CHW is None else self._mean_1CHW.lerp(now_1CHW, self._newest)
            # the log of one frame's probabilities is its logits up to a constant, so a still video keeps its labels
            return argmax_labels(self._mean_1CHW.clamp_min(torch.finfo(torch.float32).tiny).log(), grid)


# Opening a video that may be hostile: as a video and nothing else, with a limit on the size of frames.

MAX_PIXELS = 2**26
"""Default limit on the pixels of a frame: 8192 x 8192."""
_SAFE_OPTIONS = {
    "protocol_whitelist": "file",
    "format_whitelist": "mov,mp4,matroska,webm,avi,mpeg,mpegvideo,mpegts,asf,flv,ogg",
}
"""What FFmpeg may open: this file as a video. Playlists, which make FFmpeg open other files and URLs, are excluded."""


@dataclass(frozen=True)
class FrameGeometry:
    """Size and orientation of a video, read from its first frame."""

    stored_hw: tuple[int, int]
    """Height and width in pixels as stored."""
    quarter_turns: int
    """Counter-clockwise quarter turns that make a frame upright."""

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
            raise ImageError(f"'{source}' holds no video frames; expected a video such as MP4, MOV, MKV or WebM.")
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
"""Settings of the encoders at which colours and outlines look as they do in an overlay."""
_BT709, _LIMITED = 1, 1
"""How colours are stored: ITU-R BT.709 in the limited range, which players expect (ISO/IEC 23091-2)."""
_DEFAULT_FRAME_RATE = Fraction(25)


@dataclass(frozen=True)
class VideoResult:
    """What was found in a video, summed over its frames."""

    frames: int
    width: int
    """Of the upright frames, in pixels."""
    height: int
    """Of the upright frames, in pixels."""
    areas: tuple[ClassArea, ...]
    """Counted over every pixel of every frame, largest first."""
    sound: bool
    """Whether sound was copied."""
    seconds: float

    def found(self) -> list[ClassArea]:
        """Return the classes that occur with their pixels and share of all frames, largest first."""
        return list(self.areas)


def label_video(
    predictor: Predictor, source: str | Path, out: str | Path, *, alpha: float = 0.5, smooth: int = 0
) -> VideoResult:
    """Write a video whose frames are tinted by class, atomically, with a progress bar on a terminal.

    Frames keep their timestamps, also where the frame rate varies; the file's rotation is applied; sound is copied. Odd sides
    gain one row or column, as encoders need even sides.

    Args:
        predictor: The model.
        source: Video file.
        out: File to write: .mp4, .m4v, .mov, .mkv (H.264) or .webm (VP9).
        alpha: Weight of the class colours, 0...1.
        smooth: Number of frames whose probabilities are averaged (`FrameLabels`); 0 labels each frame like a single image.

    Returns:
        Number and size of the frames, areas, sound and time.

    Raises:
        ImageError: The source is no video, or damaged.
        UsageError: A setting is out of range, or the suffix of `out` cannot hold a video.
        OutputError: The file cannot be written.
        DeepLabZooError: PyAV is not installed (`pip install "deeplabzoo[video]"`).
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
                tinted = av.VideoFrame.from_ndarray(_pad_to_even(shown_HWC), format="rgb24")
                tinted = tinted.reformat(format="yuv420p", dst_colorspace=_BT709, dst_color_range=_LIMITED)
                tinted.pts, tinted.time_base = times.of(part), video.time_base
                tinted.duration = part.duration
                writing.mux(stream.encode(tinted))
                frames += 1
                bar.update()
        writing.mux(stream.encode(None))
    return frames, sound is not None


def _video_stream(writing: Any, codec: str, video: Any, shape: FrameGeometry) -> Any:
    """Return the stream to write: the source's time base, frame rate and pixel aspect ratio, and the upright size made even."""
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
    """Return the sound to copy and the stream to copy it to, or None twice where there is none that the container takes."""
    if not reading.streams.audio:
        return None, None
    sound = reading.streams.audio[0]
    if sound.codec_context.codec.canonical_name not in writing.supported_codecs:
        logger.info(
            f"{source.name}: the sound ({sound.codec_context.name}) cannot be stored in .{writing.format.name}; it is dropped"
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
    """Presentation times in the source's time base: those of the file, or by the frame rate where it has none; increasing."""

    def __init__(self, video: Any) -> None:
        self._step = max(1, round(1 / ((video.average_rate or video.guessed_rate or _DEFAULT_FRAME_RATE) * video.time_base)))
        self._last: int | None = None

    def of(self, frame: Any) -> int:
        """Return the time of the next frame."""
        given, last = frame.pts, self._last
        now = int(given) if given is not None else 0 if last is None else last + self._step
        self._last = now if last is None else max(now, last + 1)
        return self._last


def _to_upright_rgb(frame: Any, shape: FrameGeometry) -> Pixels:
    """Return the frame as upright RGB; one of another size than the first frame is resized to that."""
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
