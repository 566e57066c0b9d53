"""What installing costs: the table says what was recorded, and the record knows every extra that users may install."""

import json
import os
from pathlib import Path

import pytest

from benchmarks import install

ROOT = Path(__file__).resolve().parents[2]
RECORDS = sorted((ROOT / "benchmarks" / "install").glob("*.json"))


def test_the_page_holds_what_the_record_says(tmp_path: Path) -> None:
    """No number is typed (house rule 4)."""
    page = ROOT / "docs" / "install.md"
    copy = tmp_path / "install.md"
    copy.write_text(page.read_text(encoding="utf-8"), encoding="utf-8")
    assert install.main(["--json", str(RECORDS[-1]), "--write", str(copy)]) == 0
    assert copy.read_text(encoding="utf-8") == page.read_text(encoding="utf-8")


def test_every_extra_was_measured_and_is_explained() -> None:
    """A new extra has its price and its line on the page."""
    extras = install.extras()
    assert set(json.loads(RECORDS[-1].read_text())["extras"]) == set(extras)
    page = (ROOT / "docs" / "install.md").read_text(encoding="utf-8")
    assert not [extra for extra in extras if f"| `{extra}`" not in page]


def test_a_size_counts_what_the_light_install_has_not(tmp_path: Path) -> None:
    """Hard-linked files are the light install's own and cost nothing again."""
    for folder in ("light", "copy"):
        (tmp_path / folder).mkdir()
    (tmp_path / "light" / "torch.py").write_bytes(b"x" * 100)
    os.link(tmp_path / "light" / "torch.py", tmp_path / "copy" / "torch.py")
    (tmp_path / "copy" / "numba.py").write_bytes(b"x" * 7)
    assert install.size_bytes(tmp_path / "light") == 100
    assert install.size_bytes(tmp_path / "copy", tmp_path / "light") == 7


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--json", "{file}", "--write", "page.md"], "is not a record of"),
        (["--json", "new.json", "--extras", "fats"], "No such extra: fats; expected some of fast"),
    ],
)
def test_wrong_calls_are_one_sentence(
    words: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before anything is downloaded."""
    (tmp_path / "other.json").write_text("{}")
    assert install.main([word.format(file=tmp_path / "other.json") for word in words]) == 2
    assert sentence in capsys.readouterr().err
