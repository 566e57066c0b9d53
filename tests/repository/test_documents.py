"""What README and docs tell people to type works: blocks marked `<!-- run -->` are run, all others are listed with a reason."""

from pathlib import Path

import pytest
from helpers.documents import (
    DOCUMENTS,
    NOT_RUN,
    ROOT,
    Block,
    blocks,
    in_turn,
    make_desk,
    reason_not_to_run,
    run_block,
    without_installing,
)

QUICK = [block for block in blocks() if block.mark == "quick" and reason_not_to_run(block) is None]
SLOW = [block for block in blocks() if block.mark == "slow"]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One cache for all documents, empty at first: nobody's downloads help a command along."""
    return tmp_path_factory.mktemp("cache")


@pytest.mark.parametrize("block", [one for one in QUICK if one.language != "python"], ids=lambda block: block.name)
def test_a_command_of_the_documents_runs(block: Block, tmp_path: Path, cache: Path) -> None:
    """As a reader would type it, beside the photos of the repository (litgpt's habit; asks.md theme O)."""
    run_block(block.code, block.language, make_desk(tmp_path / "desk"), cache)


def test_the_programs_of_the_documents_run(tmp_path: Path, cache: Path) -> None:
    """Every block of Python by itself: none needs names of another."""
    programs = [block for block in QUICK if block.language == "python"]
    logged = run_block(in_turn(programs), "python", make_desk(tmp_path / "desk"), cache)
    assert [one.name for one in programs if one.name not in logged] == []


@pytest.mark.slow
@pytest.mark.parametrize("block", SLOW, ids=lambda block: block.name)
def test_the_longer_commands_run_too(block: Block, tmp_path: Path, cache: Path) -> None:
    run_block(block.code, block.language, make_desk(tmp_path / "desk"), cache)


def test_a_command_is_run_or_listed_with_a_reason() -> None:
    """A new block needs a mark, or a line in `documents.NOT_RUN`; no line there outlives its block."""
    unmarked = [block for block in blocks() if block.mark is None]
    assert [block.name for block in unmarked if reason_not_to_run(block) is None] == []
    listed = {
        (home, begins)
        for home, begins in NOT_RUN
        if any(block.document == home and block.key[1].startswith(begins) for block in blocks())
    }
    assert listed == set(NOT_RUN)


def test_the_runner_sees_the_documents() -> None:
    """A test over no commands would prove nothing; a failing command is seen, and what installs is left out."""
    assert {block.document for block in QUICK} >= {"README.md", "docs/index.md", "docs/faq.md"}
    assert len(DOCUMENTS) > 15
    assert {block.mark for block in blocks() if block.document == "docs/custom_data.md"} == {None, "own"}
    assert without_installing("pip install .\npip install . && echo two\necho three") == "\necho two\necho three"
    with pytest.raises(AssertionError, match="no-such-command"):
        run_block("no-such-command", "bash", ROOT, ROOT)


def test_images_of_the_documents_are_small_and_credited() -> None:
    """At most 150 kB each; a photo taken from elsewhere stands in CREDITS.md."""
    pictures = [path for path in (ROOT / "docs").rglob("*") if path.suffix in (".png", ".jpg", ".jpeg", ".gif")]
    assert pictures
    assert {path.name: path.stat().st_size for path in pictures if path.stat().st_size > 150_000} == {}
    credits = (ROOT / "docs" / "images" / "CREDITS.md").read_text()
    written = ("stride_", "choosing_", "scaling")  # drawn by commands
    photos = [path.name for path in (ROOT / "docs" / "images").glob("*.jpg") if not path.name.startswith(written)]
    assert [name for name in photos if f"`{name}`" not in credits] == []
