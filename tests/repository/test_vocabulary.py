"""One word for one thing, and it is the field's: words of the old dialect do not come back into the package."""

import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "deeplabzoo"

WORDS = {
    "wish, wished, wishes": (r"\bwish\w*", "override, request"),
    "nobody": (r"\bnobody\b", "name what happens"),
    "anew": (r"\banew\b", "again, from scratch, overwrite"),
    "said, told": (r"\b(?:is|are|was|were) (?:said|told)\b|\bsaid once\b", "logged"),
    "aloud": (r"\baloud\b", "logged"),
    "handout, hand out": (r"\bhand(?:ed|s)? ?outs?\b", "release, upload"),
    "asks.md": (r"asks\.md", "the public thread itself"),
    "picture": (r"\bpictures?\b", "image"),
    "photo": (r"\bphotos?\b", "image"),
    "norms": (r"(?<!batch )(?<!group )(?<![\w.\"])norms\b(?![\"\w=])", "batch norms"),
    "enlarge": (r"\benlarg\w*", "upsample"),
}
"""Word -> pattern, what to write."""

CONTRACT = (
    r"recalibrate_norms|freeze_norms|sync_norms",  # fields of a recipe
    r"\bpictures: int|recipe\.pictures|\"pictures\"",  # a field of a recipe, keys of its log and of benchmark records
    r"over all pictures \"",  # the definition of mIoU that released metrics and reports quote
    r"\bphoto(?:: str|=photo|: An image|\) if photo)|Path\(photo\)",  # keyword of DeepLab.push_to_hub
    r"\"--photos?\"|photos\b.*--|photos/ ",  # old spellings of options; a folder of photos in an example
    r"\"photos?\"|photo\.jpg|photo_type|`photo`|Parquet file: photo|photos: int|photos\.map_batches",  # columns, keys
    r"jpegimages|C:/photos|predict photos|summary\.photos|\.photos\b",  # names of folders; a public field of a summary
)
"""Lines with names that users' files, code or command lines hold: they stay."""


@pytest.mark.parametrize("word", WORDS)
def test_the_package_speaks_the_fields_language(word: str) -> None:
    """Names, docstrings, comments, messages and help: a practitioner can search for every term."""
    pattern, instead = WORDS[word]
    found = [
        f"{path.relative_to(PACKAGE)}:{number}: {line.strip()[:100]}"
        for path in sorted(PACKAGE.rglob("*.py"))
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if re.search(pattern, line, re.IGNORECASE) and not any(re.search(kept, line) for kept in CONTRACT)
    ]
    assert not found, f"write {instead}:\n" + "\n".join(found)


def test_the_search_sees_words() -> None:
    """A pattern that matches nothing would prove nothing."""
    text = "as wished nobody anew is said once aloud hand out asks.md Pictures photo the norms enlarged"
    assert [word for word, (pattern, _) in WORDS.items() if not re.search(pattern, text, re.IGNORECASE)] == []
