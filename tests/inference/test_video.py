"""Videos: every frame labelled, at its own time, upright, with its sound, in constant memory, whole or not at all."""

import struct
import subprocess
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from helpers.color_net import PALETTE, ColorNet

import deeplabzoo.cli.predict as predict
from deeplabzoo.errors import DeepLabZooError, ImageError, OutputError, UsageError
from deeplabzoo.inference.predictor import Predictor
from deeplabzoo.inference.video import FrameLabels, label_video

CLOCK = Fraction(1, 600)


def square_at(k: int, height: int = 48, width: int = 64) -> np.ndarray:
    """A red square of 16 x 16 that moves to the right by one pixel a frame, on black."""
    image = np.zeros((height, width, 3), np.uint8)
    image[8:24, k % (width - 16) : k % (width - 16) + 16, 0] = 255
    return image


def clip(
    path: Path,
    frames: int = 12,
    times: list[int] | None = None,
    picture: Callable[[int], np.ndarray] = square_at,
    sound: bool = False,
) -> Path:
    """Write a clip of lossless-looking H.264 at 20 frames a second, or at `times` in units of 1/600 s."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=20, options={"crf": "4", "preset": "ultrafast"})
        first = picture(0)
        stream.height, stream.width = first.shape[:2]
        stream.pix_fmt = "yuv444p" if first.shape[0] % 2 or first.shape[1] % 2 else "yuv420p"
        stream.codec_context.time_base = stream.time_base = CLOCK
        audio = container.add_stream("aac", rate=48000, layout="mono") if sound else None
        for k in range(frames):
            frame = av.VideoFrame.from_ndarray(picture(k), format="rgb24")
            frame.pts, frame.time_base = (times[k] if times else 30 * k), CLOCK
            container.mux(stream.encode(frame))
            if audio is not None:
                tone = np.sin(np.arange(2400) / 20, dtype=np.float32)[None]
                samples = av.AudioFrame.from_ndarray(tone, format="fltp", layout="mono")
                samples.sample_rate, samples.pts = 48000, 2400 * k
                container.mux(audio.encode(samples))
        container.mux(stream.encode(None))
        if audio is not None:
            container.mux(audio.encode(None))
    return path


def seen(path: Path) -> tuple[list[np.ndarray], list[float]]:
    """Frames and their times in seconds, as a player shows them."""
    with av.open(str(path)) as container:
        frames = list(container.decode(video=0))
    return [frame.to_ndarray(format="rgb24") for frame in frames], [float(frame.time) for frame in frames]


@pytest.fixture
def predictor() -> Predictor:
    return Predictor(ColorNet(), "cpu")


@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".mkv", ".webm"])
def test_every_frame_is_labelled_at_its_own_time(tmp_path: Path, predictor: Predictor, suffix: str) -> None:
    """As many frames, as long, and in each the square where it was, in its class's colour."""
    source = clip(tmp_path / "clip.mp4")
    result = label_video(predictor, source, tmp_path / f"out{suffix}", alpha=1.0)
    frames, times = seen(tmp_path / f"out{suffix}")
    assert (result.frames, result.width, result.height, result.sound) == (12, 64, 48, False)
    assert len(frames) == 12
    np.testing.assert_allclose(times, np.arange(12) / 20, atol=0.0011)
    for k, frame in enumerate(frames):
        assert frame.shape == (48, 64, 3)
        middle = frame[12:20, k + 4 : k + 12].reshape(-1, 3).mean(0)
        np.testing.assert_allclose(middle, PALETTE[1], atol=14)
        assert frame[36:, :].mean() < 8
    shares = {area.name: area.share for area in result.found()}
    assert shares["background"] + shares["red"] == pytest.approx(1)
    assert shares["red"] == pytest.approx(256 / (48 * 64), rel=0.35)
    with av.open(str(tmp_path / f"out{suffix}")) as written, av.open(str(source)) as read:
        assert float(written.duration) == pytest.approx(float(read.duration), abs=60_000)
        assert float(written.streams.video[0].average_rate) == pytest.approx(20, rel=0.03)


def test_a_variable_rate_stays_variable(tmp_path: Path, predictor: Predictor) -> None:
    """Phones write frames when they have them; each keeps its time, so sound and image stay together."""
    times = [0, 30, 45, 160, 161, 300, 310, 600, 690, 1200]
    source = clip(tmp_path / "clip.mp4", frames=len(times), times=times)
    label_video(predictor, source, tmp_path / "out.mp4")
    assert seen(tmp_path / "out.mp4")[1] == pytest.approx([one / 600 for one in times], abs=1e-4)


def test_rotation_is_applied(tmp_path: Path, predictor: Predictor) -> None:
    """A phone held upright stores the image lying down and a matrix; the result is upright pixels without one."""
    path = clip(tmp_path / "clip.mp4", frames=3, picture=lambda _: square_at(0))
    data = bytearray(path.read_bytes())
    matrix = data.index(b"tkhd") + 4 + 40  # version 0: the matrix stands 40 bytes after the box's name (ISO 14496-12, 8.3.2)
    quarter_clockwise = (0, 1 << 16, 0, -1 << 16, 0, 0, 48 << 16, 0, 1 << 30)
    data[matrix : matrix + 36] = struct.pack(">9i", *quarter_clockwise)
    path.write_bytes(data)
    result = label_video(predictor, path, tmp_path / "out.mp4", alpha=1.0)
    frames, _ = seen(tmp_path / "out.mp4")
    assert (result.width, result.height) == (48, 64)
    assert frames[0].shape == (64, 48, 3)
    # A quarter clockwise: what lay 8...24 below the top and at the left edge now lies at the top, 24...40 from the left.
    np.testing.assert_allclose(frames[0][4:12, 28:36].reshape(-1, 3).mean(0), PALETTE[1], atol=14)
    assert frames[0][40:].mean() < 8
    with av.open(str(tmp_path / "out.mp4")) as written:
        assert next(written.decode(video=0)).rotation == 0


def test_sound_is_copied_packet_by_packet(tmp_path: Path, predictor: Predictor) -> None:
    """Not decoded and encoded again: the same bytes at the same times."""
    source = clip(tmp_path / "clip.mp4", sound=True)

    def packets(path: Path) -> list[tuple[bytes, float]]:
        with av.open(str(path)) as container:
            found = [packet for packet in container.demux(audio=0) if packet.dts is not None]
            return [(bytes(packet), round(float(packet.pts * packet.time_base), 4)) for packet in found]

    for suffix in (".mp4", ".mkv"):
        assert label_video(predictor, source, tmp_path / f"out{suffix}").sound
        copied, original = packets(tmp_path / f"out{suffix}"), packets(source)
        assert [data for data, _ in copied] == [data for data, _ in original]
        assert [at for _, at in copied] == pytest.approx([at for _, at in original], abs=0.03)


def test_unsupported_audio_is_dropped_and_logged(
    tmp_path: Path, predictor: Predictor, caplog: pytest.LogCaptureFixture
) -> None:
    """WebM takes no AAC: the images are written, and a line says what is missing."""
    source = clip(tmp_path / "clip.mp4", sound=True)
    assert not label_video(predictor, source, tmp_path / "out.webm").sound
    assert "the sound (aac) cannot be stored in" in caplog.text
    assert len(seen(tmp_path / "out.webm")[0]) == 12


def test_odd_sizes_gain_a_pixel_and_it_is_logged(
    tmp_path: Path, predictor: Predictor, caplog: pytest.LogCaptureFixture
) -> None:
    """Encoders take pairs of pixels; the last row and column are repeated."""
    source = clip(tmp_path / "clip.mp4", frames=3, picture=lambda k: square_at(k, 45, 63))
    result = label_video(predictor, source, tmp_path / "out.mp4")
    assert (result.width, result.height) == (63, 45)
    assert seen(tmp_path / "out.mp4")[0][0].shape == (46, 64, 3)
    assert "written as 64 x 46" in caplog.text


def test_without_smoothing_a_frame_is_an_image(predictor: Predictor) -> None:
    """The same labels as the predictor's, frame by frame; and the first smoothed frame is that, too."""
    plain, smoothed = FrameLabels(predictor, (48, 64)), FrameLabels(predictor, (48, 64), smooth=5)
    rng = np.random.default_rng(0)
    for k in range(4):
        image = rng.integers(0, 256, (48, 64, 3), np.uint8)
        np.testing.assert_array_equal(plain(image), predictor(image).labels)
        if k == 0:
            np.testing.assert_array_equal(smoothed(image), predictor(image).labels)


def test_smoothing_rides_over_a_flicker_and_follows_a_change(predictor: Predictor) -> None:
    """One odd frame among equal ones is outvoted; a change that lasts is followed."""
    red, blue = (np.zeros((48, 64, 3), np.uint8) for _ in range(2))
    red[..., 0], blue[..., 2] = 255, 255
    labels = FrameLabels(predictor, (48, 64), smooth=4)
    shown = [int(labels(image)[20, 20]) for image in (red, red, red, blue, red, red, *[blue] * 6)]
    assert shown[:6] == [1] * 6
    assert shown[6] == 1
    assert shown[-3:] == [3, 3, 3]
    plain = FrameLabels(predictor, (48, 64))
    assert [int(plain(image)[20, 20]) for image in (red, blue, red)] == [1, 3, 1]


def test_smoothing_needs_sense(predictor: Predictor) -> None:
    """A negative number of frames, or frames in tiles, whose logits are never whole."""
    with pytest.raises(UsageError, match="smooth must be 0"):
        FrameLabels(predictor, (48, 64), smooth=-1)
    with pytest.raises(UsageError, match="does not go with tiles"):
        FrameLabels(Predictor(ColorNet(), "cpu", tile=64), (480, 640), smooth=3)


def test_a_failure_leaves_no_file(tmp_path: Path, predictor: Predictor, monkeypatch: pytest.MonkeyPatch) -> None:
    """A half-written video never counts: what stood there before stands there still, and no partial file is left."""
    source, out = clip(tmp_path / "clip.mp4"), tmp_path / "out.mp4"
    out.write_bytes(b"an earlier result")

    def breaks(self: FrameLabels, image: np.ndarray) -> np.ndarray:
        if self._counts.sum():
            raise KeyboardInterrupt
        return real(self, image)

    real = FrameLabels.__call__
    monkeypatch.setattr(FrameLabels, "__call__", breaks)
    with pytest.raises(KeyboardInterrupt):
        label_video(predictor, source, out)
    assert out.read_bytes() == b"an earlier result"
    assert sorted(one.name for one in tmp_path.iterdir()) == ["clip.mp4", "out.mp4"]


@pytest.mark.parametrize("content", [b"", b"no video at all", None])
def test_what_is_no_video_is_one_sentence(tmp_path: Path, predictor: Predictor, content: bytes | None) -> None:
    """Empty, another kind of file, or cut short before its index: said, and nothing written."""
    source = clip(tmp_path / "clip.mp4")
    source.write_bytes(source.read_bytes()[:1000] if content is None else content)
    with pytest.raises(ImageError, match="cannot be read as a video") as error:
        label_video(predictor, source, tmp_path / "out.mp4")
    assert str(error.value).endswith(".")
    assert "\n" not in str(error.value)
    assert [one.name for one in tmp_path.iterdir()] == ["clip.mp4"]
    with pytest.raises(ImageError, match="does not exist"):
        label_video(predictor, tmp_path / "none.mp4", tmp_path / "out.mp4")


def test_sound_alone_is_no_video(tmp_path: Path, predictor: Predictor) -> None:
    with av.open(str(tmp_path / "song.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=48000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 4800), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 48000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    with pytest.raises(ImageError, match="holds no video frames"):
        label_video(predictor, tmp_path / "song.mp4", tmp_path / "out.mp4")


def test_places_that_cannot_be_written(tmp_path: Path, predictor: Predictor) -> None:
    """Another suffix, the video itself, a folder that is not there."""
    source = clip(tmp_path / "clip.mp4", frames=2)
    with pytest.raises(UsageError, match=r"ends in \.mp4"):
        label_video(predictor, source, tmp_path / "out.gif")
    with pytest.raises(UsageError, match="would overwrite"):
        label_video(predictor, source, source)
    with pytest.raises(OutputError):
        label_video(predictor, source, tmp_path / "nowhere" / "out.mp4")


def test_without_pyav_the_extra_is_named(tmp_path: Path, predictor: Predictor, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library is optional; whoever needs it is told what to install."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DeepLabZooError, match=r'pip install "deeplabzoo\[video\]"'):
        label_video(predictor, tmp_path / "clip.mp4", tmp_path / "out.mp4")


def test_the_predict_command_takes_a_video(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`predict clip.mp4 --out clip_seg.mp4`, and what does not go with a video is refused before the network is loaded."""
    monkeypatch.setattr(predict, "load_named_model", lambda model, weights: ColorNet())
    source, out = str(clip(tmp_path / "clip.mp4")), str(tmp_path / "clip_seg.mp4")
    assert predict.main([source, "--out", out, "--smooth", "3"]) == 0
    assert capsys.readouterr().out.startswith("clip.mp4: 12 frames, background 9")
    assert len(seen(Path(out))[0]) == 12

    def never(model: str, weights: str | None) -> ColorNet:
        raise AssertionError

    monkeypatch.setattr(predict, "load_named_model", never)
    photo = str(tmp_path / "photo.png")
    for wrong in (
        [source, "--out", out, "--labels"],
        [source, photo, "--out", out],
        [source, "--out", "a.png"],
        [source, "--out", source],
    ):
        assert predict.main(wrong) == 2, wrong
    assert predict.main([photo, "--out", "a.png", "--smooth", "3"]) == 2
    assert predict.main([str(tmp_path / "none.mp4"), "--out", out]) == 1


MEMORY = """
import resource, sys
sys.path.insert(0, sys.argv[1])
from helpers.color_net import ColorNet
from deeplabzoo.inference.predictor import Predictor
from deeplabzoo.inference.video import label_video
import torch
torch.set_num_threads(1)
label_video(Predictor(ColorNet(), "cpu"), sys.argv[2], sys.argv[3])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.posix
@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_frames(tmp_path: Path) -> None:
    """Ten times as many frames, the same peak: 270 more frames kept as pixels would be 35 MB."""
    peaks = []
    for frames in (30, 300):
        source = clip(tmp_path / f"{frames}.mp4", frames, picture=lambda k: square_at(k, 180, 240))
        command = [
            sys.executable,
            "-c",
            MEMORY,
            str(Path(__file__).parents[1]),
            str(source),
            str(tmp_path / f"{frames}_out.mp4"),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        peaks.append(int(done.stdout) / 1024)
    assert peaks[1] - peaks[0] < 12, peaks
