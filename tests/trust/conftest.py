"""What the tests of training faults share: the process that forks their runs, generated pictures, and an undisturbed run."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from training_runs import Driver, driver, finished, write_images


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Driver]:
    """The driver of tiny runs; libraries are imported once."""
    with driver(tmp_path_factory.mktemp("driver")) as one:
        yield one


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder to train on; tests that spoil pictures take a copy."""
    return write_images(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="session")
def reference(runs: Driver, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nothing disturbs."""
    out = tmp_path_factory.mktemp("reference") / "run"
    finished(runs.train(out, pictures))
    return out
