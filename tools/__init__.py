"""Writers of this repository's tables and documents; not part of the package."""
