"""Class names come from files that may not be trusted: no command sends their control characters to the terminal."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import deeplabzoo
from deeplabzoo.cli import convert, evaluate

HOSTILE = ("sky\x1b[2J", "line\nbreak", "\u202eevil")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose class names hold an escape sequence, a line break and a bidirectional override."""
    net = deeplabzoo.create("deeplabv3plus_lcnet_050", num_classes=3)
    net.reset_classifier(3, classes=HOSTILE)
    path = tmp_path_factory.mktemp("hostile") / "hostile.safetensors"
    net.save(path)
    return path


def terminal_text(captured: pytest.CaptureFixture[str]) -> str:
    """What a command wrote, without the line breaks that separate its own lines."""
    out, err = captured.readouterr()
    return (out + err).replace("\n", "")


def test_convert_escapes_class_names(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its line of classes is one printable line."""
    assert convert.main([str(checkpoint), "--out", str(tmp_path / "out.safetensors")]) == 0
    text = terminal_text(capsys)
    assert text.isprintable()
    assert r"sky\x1b[2J, line\nbreak, \u202eevil" in text


def test_evaluate_escapes_class_names(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The table names every class without its control characters, the log too."""
    for kind in ("images", "masks"):
        (tmp_path / "val" / kind).mkdir(parents=True)
    Image.new("RGB", (64, 48), (30, 90, 200)).save(tmp_path / "val" / "images" / "a.png")
    Image.fromarray(np.arange(64 * 48, dtype=np.uint16).reshape(48, 64).astype(np.uint8) % 3).save(
        tmp_path / "val" / "masks" / "a.png"
    )
    assert evaluate.main([str(checkpoint), "--data", "folder", "--root", str(tmp_path), "--device", "cpu"]) == 0
    text = terminal_text(capsys)
    assert r"sky\x1b[2J" in text
    assert "\x1b" not in text
    assert "\u202e" not in text


def test_json_to_stdout_is_the_only_output(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`--json -` can be piped into a JSON reader: the table goes to stderr."""
    import json

    test_evaluate_escapes_class_names(checkpoint, tmp_path, capsys)
    call = [str(checkpoint), "--data", "folder", "--root", str(tmp_path), "--device", "cpu", "--json", "-"]
    assert evaluate.main(call) == 0
    captured = capsys.readouterr()
    assert set(json.loads(captured.out)["per_class"]) == set(HOSTILE)
    assert "mIoU" in captured.err
