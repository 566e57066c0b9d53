"""The environment variables that forbid the network, for everything that could reach it."""

import contextlib
import os
from collections.abc import Iterator

OFFLINE_SWITCHES = ("DEEPLABZOO_OFFLINE", "HF_HUB_OFFLINE")


def offline_switch() -> str:
    """Return the environment variable that forbids the network, or an empty string."""
    return next((name for name in OFFLINE_SWITCHES if os.environ.get(name, "").lower() in ("1", "true", "yes", "on")), "")


@contextlib.contextmanager
def hf_offline_mode() -> Iterator[None]:
    """Apply `DEEPLABZOO_OFFLINE` to the Hub client while other code (timm, for an encoder's weights) uses it.

    The client reads its own switch once, when it is imported.
    """
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or bool(offline_switch())
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before
