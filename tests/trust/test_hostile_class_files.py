"""classes.txt and lists of a split of every wrong kind: text files that people write by hand, or that are no text at all.

The fuzzer of `test_fuzz.py` changes right ones; here are the kinds that somebody has, each with its sentence.
"""

import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from image_attacks import saved
from mask_attacks import write_folder
from PIL import Image

from deeplabzoo.cli.prepare import main as prepare
from deeplabzoo.data import class_file, dataset
from deeplabzoo.data.class_file import read_class_file
from deeplabzoo.data.dataset import build_dataset, read_list
from deeplabzoo.errors import DataError

LONGEST_LINE, LARGEST_FILE = 200, 1 << 20
"""Characters of a line and bytes of a file that the parser of classes.txt looks into at most."""

WRONG = {
    "empty": (b"", "is empty"),
    "blank lines": (b"\n \r\n\t\n", "is empty"),
    "a mark alone": (b"\xef\xbb\xbf", "is empty"),
    "UTF-16": ("ground\nsquare\n".encode("utf-16"), "not UTF-8 text"),
    "Latin-1": ("Gel\xe4nder\n".encode("latin-1"), "not UTF-8 text"),
    "a picture": (saved(Image.new("RGB", (9, 9)), "PNG"), "not UTF-8 text"),
    "zeros": (bytes(100), "control codes"),
    "terminal codes": (b"ground\n\x1b[2Jsquare\n", "control codes in the line"),
    "a page break": (b"ground\x0csquare\n", "control codes"),
    "Unicode's own line break": ("ground\u2028square\n".encode(), "control codes"),
    "half a character": (b"ground \xed\xa0\x80\n", "not UTF-8 text"),
    "256 classes": ("\n".join(f"class {one}" for one in range(256)).encode(), "names 256 classes; at most 255"),
    "a long line": (b"g" * 5000, "line of 5000 characters"),
    "spaces without end": (b"ground" + b" " * 300_000 + b"square\n", "characters; expected a class name"),
    "megabytes": (b"ground\n" * 300_000, "has more than"),
    "a name twice": (b"ground\nsquare\nground\n", "names 'ground' twice"),
    "a colour twice": (b"ground #000000\nsquare 0,0,0\n", "gives the id or colour of 'square 0,0,0' to another class"),
    "an id twice": (b"ground id=7\nsquare id=7\n", "to another class, too"),
    "an id that no mask holds": (b"ground id=0\nsquare id=99999\n", "from 0 to 65535"),
    "a colour above 255": (b"ground 0,0,256\n", "three numbers from 0 to 255"),
    "colours for some": (b"ground #000000\nsquare\n", "gives some lines a colour but not 'square'"),
    "a colour alone": (b"#ff0000\nsquare #00ff00\n", "gives some lines a colour but not '#ff0000'"),
}


class RecordingPattern:
    """The pattern of a line, which is tried on short lines only and records how long they are."""

    def __init__(self, pattern: re.Pattern[str]) -> None:
        self.pattern = pattern
        self.lengths: list[int] = []

    def fullmatch(self, line: str) -> re.Match[str] | None:
        assert len(line) <= LONGEST_LINE
        self.lengths.append(len(line))
        return self.pattern.fullmatch(line)


@pytest.mark.parametrize(("content", "words"), WRONG.values(), ids=WRONG.keys())
def test_a_wrong_class_file_is_one_sentence_at_once(
    content: bytes, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the reader and from the command, naming the file; and no line takes time by being long.

    The pattern of a line needs time that grows with the square of a line's spaces, so it is tried on short lines only.
    """
    pattern = RecordingPattern(class_file._LINE)
    monkeypatch.setattr(class_file, "_LINE", pattern)
    root = write_folder(tmp_path / "data")
    file = root / "classes.txt"
    file.write_bytes(content)
    with pytest.raises(DataError) as error:
        read_class_file(file)
    assert sum(pattern.lengths) <= min(len(content), LARGEST_FILE)
    assert words in str(error.value)
    assert str(file) in str(error.value)
    assert str(error.value).isprintable()
    assert prepare(["folder", "--root", str(root)]) == 1
    assert capsys.readouterr().err == f"error: {error.value}\n"


RIGHT = {
    "plain": b"ground\nsquare\ndisc\n",
    "from Windows": b"\xef\xbb\xbfground\r\nsquare\r\ndisc\r\n",
    "from an old Mac": b"ground\rsquare\rdisc",
    "tabs before the ids": b"ground\tid=0\nsquare\tid=1\ndisc\t id=2\n",
    "digits and signs in names": b"ground 2\nsquare-#1\ndisc 1,2\n",
}


@pytest.mark.parametrize("content", RIGHT.values(), ids=RIGHT.keys())
def test_a_right_class_file_from_anywhere_is_read(content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every line of it is tried on the pattern."""
    pattern = RecordingPattern(class_file._LINE)
    monkeypatch.setattr(class_file, "_LINE", pattern)
    (tmp_path / "classes.txt").write_bytes(content)
    assert [name.split()[0].split("-")[0] for name in read_class_file(tmp_path / "classes.txt").classes] == [
        "ground",
        "square",
        "disc",
    ]
    assert len(pattern.lengths) == 3


@pytest.mark.parametrize(
    "name", ["\u0622\u0628\u200c\u0631\u0627\u0647", "Stra\u00dfe", "\u9053\u8def", "\U0001f3e0 house", "a\u00a0b"]
)
def test_names_in_any_script_are_names(name: str, tmp_path: Path) -> None:
    """Joiners and spaces that do not break belong to words."""
    (tmp_path / "classes.txt").write_text(f"{name}\nother\n", encoding="utf-8")
    assert read_class_file(tmp_path / "classes.txt").classes == (name, "other")


def test_a_class_file_that_is_not_a_file_is_reported(tmp_path: Path) -> None:
    """A folder or a link to nothing of that name: as if there were none, and the sentence says what to write there."""
    for number, make in enumerate((Path.mkdir, lambda path: path.symlink_to("nowhere.txt"), os.mkfifo)):
        root = write_folder(tmp_path / str(number))
        (root / "classes.txt").unlink()
        make(root / "classes.txt")
        with pytest.raises(DataError, match=r"The classes of .* have no names; write them into '.*classes\.txt'"):
            build_dataset("folder", root, "val")


LISTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty": (lambda path: path.touch(), "is empty"),
    "UTF-16": (lambda path: path.write_text("val0\n", encoding="utf-16"), "is not UTF-8 text"),
    "a picture": (lambda path: path.write_bytes(saved(Image.new("L", (4, 4)), "PNG")), "is not UTF-8 text"),
    "a folder": (lambda path: path.mkdir(), "cannot be read: Is a directory"),
    "missing": (lambda path: None, "cannot be read: No such file"),
    "a link to itself": (lambda path: path.symlink_to(path.name), "cannot be read: Too many levels"),
    "a name twice": (lambda path: path.write_text("a.jpg\nb\na.png\n"), "lists 'a' more than once (1 such names)"),
    "many names twice": (lambda path: path.write_text("\n".join(map(str, [*range(30_000)] * 2))), "(30000 such names)"),
}


class CountingName(str):
    """A name that counts how often two names are compared."""

    __slots__ = ()
    compared = 0

    def __eq__(self, other: object) -> bool:
        CountingName.compared += 1
        if CountingName.compared > 1_000_000:
            raise AssertionError("each name is compared with all others")
        return str.__eq__(self, other)

    __hash__ = str.__hash__


@pytest.mark.parametrize(("make", "words"), LISTS.values(), ids=LISTS.keys())
def test_a_wrong_list_of_a_split_is_one_sentence_at_once(
    make: Callable[[Path], object], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sixty thousand lines with repeats are counted once, not each against all others."""
    stem = dataset._stem
    monkeypatch.setattr(dataset, "_stem", lambda name: CountingName(stem(name)))
    monkeypatch.setattr(CountingName, "compared", 0)
    make(tmp_path / "train.txt")
    with pytest.raises(DataError) as error:
        read_list(tmp_path / "train.txt")
    assert CountingName.compared <= 200_000
    assert words in str(error.value)
    assert str(error.value).isprintable()


@pytest.mark.parametrize("line", ["../../etc/passwd", "/etc/passwd", "val\0", "nobody", "\x1b[2J"])
def test_a_list_names_images_of_its_folder_alone(line: str, tmp_path: Path) -> None:
    """A name is looked for among the pictures; no path leads out of the folder."""
    root = write_folder(tmp_path / "data")
    for kind in ("images", "masks"):
        (root / "val" / kind).rename(root / kind)
    (root / "val").rmdir()
    (root / "val.txt").write_text(f"val0\n{line}\n")
    with pytest.raises(DataError, match=r"1 of the 2 images in '.*val\.txt' have no image"):
        build_dataset("folder", root, "val")
