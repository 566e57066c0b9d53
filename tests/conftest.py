"""What every test shares: one torch thread, no network, a private cache, and the way to real images where they exist."""

import logging
import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip on Windows what needs POSIX."""
    if sys.platform == "win32":
        for item in items:
            if item.get_closest_marker("posix"):
                item.add_marker(pytest.mark.skip(reason="Windows has no signals, terminals or memory limits of POSIX"))


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _log_level(caplog: pytest.LogCaptureFixture) -> None:
    """INFO lines of the package are captured, as the commands show them."""
    caplog.set_level(logging.INFO, logger="deeplabzoo")


@pytest.fixture(autouse=True)
def _private_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or fills the user's cache, and none can reach a hub by accident."""
    monkeypatch.setenv("DEEPLABZOO_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.delenv("DEEPLABZOO_OFFLINE", raising=False)
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder with real images, masks and models that are not part of the repository; see CONTRIBUTING.md."""
    folder = Path(os.environ.get("DEEPLABZOO_DATA") or ROOT.parent / "shared" / "data")
    if not folder.is_dir():
        pytest.skip("real images are absent: set DEEPLABZOO_DATA to the folder that holds voc2012_subset and tflite")
    return folder
