"""Whether a file is the published one: its size and hash against what its row says."""

import hashlib
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

    def complaint(self, path: Path) -> str:
        """Return why `path` is not the published file, as a phrase, or an empty string where it is.

        The whole file is read each time: hashing is cheaper than loading, and a remembered answer can be wrong.
        """
        size = path.stat().st_size
        if self.bytes is not None and size != self.bytes:
            return f"it has {size} bytes, {self.bytes} are published"
        published = self.sha256 or self.sha256_prefix
        if published:
            found = sha256_of(path)
            if not found.startswith(published):
                return f"its sha256 is {found[: max(12, len(self.sha256_prefix or ''))]}…, published is {published[:12]}…"
        return ""


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file as 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
