"""The `config.json` that transformers and SMP keep beside their tensors, which anybody may have written."""

from pathlib import Path
from typing import Any

from deeplabzoo.plain_json import parse_json

_MAX_BYTES = 1 << 20


def settings_beside(path: Path) -> dict[str, Any]:
    """Return what the `config.json` in a weights file's folder says; nothing where there is none, or none that can be read."""
    beside = path.with_name("config.json")
    try:
        if not beside.is_file():  # a link to a device has no end, and a pipe no beginning
            return {}
        with beside.open("rb") as file:
            data = file.read(_MAX_BYTES + 1)
        found = parse_json(data) if len(data) <= _MAX_BYTES else None
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
