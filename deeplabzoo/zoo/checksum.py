"""Whether a file is the published one: its size and hash against what its row says."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from deeplabzoo.zoo.manifest import WeightRow


@dataclass(frozen=True)
class Expected:
    """What is published about a file; None where the publisher says nothing."""

    bytes: int | None = None
    sha256: str | None = None
    sha256_prefix: str | None = None

    @classmethod
    def of(cls, row: WeightRow) -> Self:
        """Take the published facts from a manifest row."""
        return cls(row.bytes, row.sha256, row.sha256_prefix)

    def complaint(self, path: Path, hash_of: Callable[[Path], str] | None = None) -> str:
        """Return why `path` is not the published file, as a phrase, or an empty string where it is.

        `hash_of` is how its SHA-256 is found; without it the whole file is read.
        """
        size = path.stat().st_size
        if self.bytes is not None and size != self.bytes:
            return f"it has {size} bytes, {self.bytes} are published"
        published = self.sha256 or self.sha256_prefix
        if published:
            found = (hash_of or sha256_of)(path)
            if not found.startswith(published):
                return f"its sha256 is {found[: max(12, len(self.sha256_prefix or ''))]}…, published is {published[:12]}…"
        return ""


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file as 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
