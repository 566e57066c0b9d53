"""Hostile videos: cut, changed, lying, or playlists in a video's name; a video or one sentence, and no other file opened.

They are read in a process of their own, as FFmpeg is no Python: were it to crash, the test would say so.
"""

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fuzz.contract import Target, limited_memory, the_watch
from fuzz.mutation import mutated
from helpers.color_net import ColorNet
from test_video import clip
from trust_record import TrustRecord, write_record

from deeplabzoo.errors import ImageError
from deeplabzoo.inference.predictor import Predictor
from deeplabzoo.inference.video import label_video

PARTS = Path(__file__).resolve().parent
SUFFIXES = (".mp4", ".mkv", ".webm", ".avi", ".ts")
CHANGES = 1_000
"""Changed videos that a soak run tries."""
CUTS = 20
STATED_SECONDS, STATED_MEBIBYTES, LIMIT_MEBIBYTES = 20, 700, 3000
"""Processor time and memory stated for one small hostile video; address space that its process may take."""


def write_clips(folder: Path) -> dict[str, bytes]:
    """A clip of four frames in every container."""
    found = {}
    for suffix in SUFFIXES:
        path = folder / f"clip{suffix}"
        if suffix == ".webm":
            label_video(Predictor(ColorNet()), folder / "clip.mp4", path)
        else:
            clip(path, frames=4)
        found[suffix] = path.read_bytes()
    return found


def no_video(kind: str, folder: Path) -> bytes:
    """What stands in a file that has a video's name."""
    neighbour = clip(folder / "neighbour.ts", frames=2)
    return {
        "playlist": f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{neighbour}\n#EXT-X-ENDLIST\n",
        "playlist of an address": "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nhttp://127.0.0.1:9/a.ts\n#EXT-X-ENDLIST\n",
        "list of files": "ffconcat version 1.0\nfile neighbour.ts\n",
        "session": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n",
        "words": "no video at all\n" * 50,
        "graph": "color=c=red:s=64x64:d=1",
        "subtitles": "1\n00:00:00,000 --> 00:00:02,000\nred\n",
    }[kind].encode()


@pytest.mark.parametrize(
    "kind", ["playlist", "playlist of an address", "list of files", "session", "words", "graph", "subtitles"]
)
@pytest.mark.parametrize("suffix", [".mp4", ".ts"])
def test_a_text_that_leads_elsewhere_is_no_video(kind: str, suffix: str, tmp_path: Path) -> None:
    """FFmpeg would open what playlists name, on this disk and in the network; here that is refused."""
    source = tmp_path / f"clip{suffix}"
    source.write_bytes(no_video(kind, tmp_path))
    with pytest.raises(ImageError, match=r"cannot be read as a video|not one frame"):
        label_video(Predictor(ColorNet()), source, tmp_path / "out.mp4")
    assert not (tmp_path / "out.mp4").exists()


@pytest.mark.parametrize("name", ["http:clip.mp4", "concat:clip.mp4", "pipe:0.mp4", "two\nlines.mp4", "caf\u00e9.mp4"])
def test_no_name_is_taken_for_an_address(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file in this folder is that file, whatever FFmpeg makes of its name."""
    monkeypatch.chdir(tmp_path)
    clip(tmp_path / "ok.mp4", frames=2).rename(tmp_path / name)
    assert label_video(Predictor(ColorNet()), name, "out.mp4").frames == 2


@pytest.mark.parametrize("kind", ["pipe", "folder", "device", "missing"])
def test_what_is_no_file_is_a_sentence_at_once(kind: str, tmp_path: Path) -> None:
    """A pipe that nobody writes would be waited for without end."""
    source = tmp_path / "clip.mp4"
    match kind:
        case "pipe":
            os.mkfifo(source)
        case "folder":
            source.mkdir()
        case "device":
            source.symlink_to("/dev/zero")
    with pytest.raises(ImageError, match=r"is no file|does not exist"):
        label_video(Predictor(ColorNet()), source, tmp_path / "out.mp4")


def test_frames_beyond_the_limit_are_refused_before_they_are_decoded(tmp_path: Path) -> None:
    """A limit that was set holds for videos, too, and one pixel less than a frame is enough to refuse it."""
    source = clip(tmp_path / "clip.mp4", frames=2)
    with pytest.raises(ImageError, match=r"frames of 64 x 48 pixels, more than the limit of 3071"):
        label_video(Predictor(ColorNet(), max_pixels=3071), source, tmp_path / "out.mp4")
    assert label_video(Predictor(ColorNet(), max_pixels=3072), source, tmp_path / "out.mp4").frames == 2


def test_a_code_that_nobody_knows_is_a_sentence(tmp_path: Path) -> None:
    """Frames under an unknown name of their code: there is no decoder to ask for their size."""
    source = clip(tmp_path / "clip.mp4", frames=2)
    source.write_bytes(source.read_bytes().replace(b"avc1", b"zzzz"))
    with pytest.raises(ImageError, match="a code that FFmpeg does not know"):
        label_video(Predictor(ColorNet()), source, tmp_path / "out.mp4")


def _label(path: Path) -> object:
    out = path.with_name("out.mp4")
    try:
        return label_video(Predictor(ColorNet(), max_pixels=4_000_000), path, out)
    finally:
        out.unlink(missing_ok=True)


def attack(folder: Path, changes: int, cuts: int, seed: int) -> None:
    """Label changed and cut videos in this process and print what became of them; a line before each, should it crash."""
    files = write_clips(folder)
    label_video(Predictor(ColorNet()), folder / "clip.avi", folder / "first.mp4")  # loads what is loaded once
    watch, random_ = the_watch(), random.Random(seed)
    inputs = [(suffix, data[: len(data) * cut // cuts]) for suffix, data in files.items() for cut in range(cuts)]
    inputs += [(suffix, mutated(files[suffix], random_)) for suffix in random_.choices(SUFFIXES, k=changes)]
    scratch = folder / "scratch"
    scratch.mkdir()
    answered = refused = 0
    broken: dict[str, str] = {}
    slowest = 0.0
    with limited_memory(LIMIT_MEBIBYTES):
        for suffix, data in inputs:
            name = f"a{suffix}"
            target = Target(
                "video", _label, list, file_name=name, seconds=STATED_SECONDS, mebibytes=STATED_MEBIBYTES, writes=True
            )
            (folder / "last").write_bytes(data)
            began = time.process_time()
            found = watch.run(target, data, scratch)
            slowest = max(slowest, time.process_time() - began)
            (scratch / name).unlink()
            answered += watch.outcome is None
            refused += watch.outcome is not None
            if found is not None:
                broken.setdefault(found.where, f"{suffix}: {found.what}")
    print(json.dumps({"answered": answered, "refused": refused, "broken": broken, "slowest_s": round(slowest, 2)}))


def attacked(folder: Path, changes: int, cuts: int, seed: int) -> dict[str, object]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(PARTS), str(PARTS.parent)))}
    arguments = f"Path({str(folder)!r}), {changes}, {cuts}, {seed}"
    call = f"from pathlib import Path; import test_hostile_images_video as t; t.attack({arguments})"
    process = subprocess.run([sys.executable, "-c", call], capture_output=True, text=True, env=environment, check=False)
    assert process.returncode == 0, f"status {process.returncode}: {process.stderr[-2000:]}"
    logged: dict[str, object] = json.loads(process.stdout.splitlines()[-1])
    return logged


@pytest.mark.soak
@pytest.mark.timeout(7200)
def test_hostile_videos_in_full(tmp_path: Path) -> None:
    """Cut and changed clips of every container: a whole video or a sentence, in the time and memory stated; no crash."""
    began = time.monotonic()
    logged = attacked(tmp_path, CHANGES, CUTS, 1)
    inputs = CHANGES + CUTS * len(SUFFIXES)
    write_record(
        TrustRecord(
            name="hostile_videos",
            area="images",
            what="Videos of five containers cut and changed at random, labelled in a process of their own.",
            command="DEEPLABZOO_RECORD=1 python -m pytest -m soak tests/trust/test_hostile_images_video.py",
            seconds=round(time.monotonic() - began, 1),
            inputs=inputs,
            faults=inputs,
            survived=inputs - len(logged["broken"]),
            details=logged,
        )
    )
    assert not logged["broken"]
