"""Masks of every wrong kind through the check of a folder, the evaluation and the training loader: the same sentence in each.

A right mask that looks odd gives its labels; a wrong one is named, the status is 1, and nothing is written.
"""

import random
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from fuzz.contract import Target
from fuzz.mutation import mutated
from image_attacks import STATED_MEBIBYTES, STATED_SECONDS
from image_tally import Tally, warmed
from mask_attacks import CLASSES, LABELS, MASKS, NUMBERS, RIGHT, WRONG, Mask, write_folder
from PIL import Image
from trust_record import TrustRecord, write_record

import deeplabzoo
from deeplabzoo.cli.prepare import main as prepare
from deeplabzoo.data.dataset import build_dataset
from deeplabzoo.data.image_io import read_mask
from deeplabzoo.data.image_mask_dataset import default_label_map, map_labels
from deeplabzoo.data.transforms import Augmentation
from deeplabzoo.data.validation import check_folder
from deeplabzoo.errors import DataError, DeepLabZooError
from deeplabzoo.evaluation.plots import WorstImages, draw_plots
from deeplabzoo.models.config import Preprocessing
from deeplabzoo.models.deeplab import DeepLab
from deeplabzoo.training.dataloader import Batch, BatchDataset, iterate_batches
from deeplabzoo.training.recipe import Recipe

RECIPE = Recipe(name="t", model="-", data="folder", steps=4, batch=2, augmentation=Augmentation(crop=(24, 32), scale=(1, 1)))
CHANGES = 20_000
"""Changed masks that a soak run tries."""


@pytest.fixture(scope="module")
def net() -> DeepLab:
    return deeplabzoo.create("deeplabv3plus_lcnet_050", num_classes=len(CLASSES)).eval()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "data")


def train(root: Path) -> list[Batch]:
    """Every picture of the training split, as the loader gives it to the network."""
    return list(iterate_batches(BatchDataset(build_dataset("folder", root, "train"), RECIPE, Preprocessing()), 0, 2, workers=0))


def entrances(net: DeepLab) -> dict[str, Callable[[Path], object]]:
    return {
        "check": check_folder,
        "evaluation": lambda root: deeplabzoo.evaluate(net, "folder", root, "val", progress=False, engine=None),
        "training": train,
    }


def put(mask: Mask, root: Path) -> list[Path]:
    """Set the mask in the place of one mask of each split."""
    paths = [root / "train" / "masks" / "train0.png", root / "val" / "masks" / "val0.png"]
    for path in paths:
        path.unlink()
        mask.write(path)
    return paths


def sentences(mask: Mask, root: Path, net: DeepLab) -> Iterator[tuple[str, str | None]]:
    """What each entrance says of a folder with the mask; None where it takes it."""
    paths = put(mask, root)
    before = sorted(root.rglob("*"))
    for name, enter in entrances(net).items():
        try:
            enter(root)
            yield name, None
        except DeepLabZooError as error:
            logged = str(error)
            assert any(path.stem in logged for path in paths), logged
            yield name, logged
        assert sorted(root.rglob("*")) == before


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_mask_is_one_sentence_everywhere(kind: str, root: Path, net: DeepLab) -> None:
    """It names the file, and what is wrong with it, before a step is made or a score is told."""
    for entrance, logged in sentences(WRONG[kind], root, net):
        assert logged is not None, f"{entrance} took it"
        assert re.search(WRONG[kind].words or "", logged), f"{entrance}: {logged}"
        assert logged.isprintable()


@pytest.mark.parametrize("kind", RIGHT)
def test_a_right_mask_that_looks_odd_gives_its_labels(kind: str, root: Path, net: DeepLab) -> None:
    """Palettes, alpha, 1 to 32 bits, another format in a PNG's name: the numbers as they are stored."""
    assert all(logged is None for _, logged in sentences(RIGHT[kind], root, net))
    got = build_dataset("folder", root, "val")[0].labels
    np.testing.assert_array_equal(got, RIGHT[kind].labels)


def test_masks_without_a_label_are_no_data(root: Path, net: DeepLab) -> None:
    """All void: the check says so; an evaluation has nothing to score and says that, too."""
    for path in root.glob("*/masks/*.png"):
        Image.fromarray(LABELS * 0 + 255).save(path)
    with pytest.raises(DataError, match="No pixel of folder train is labelled"):
        check_folder(root)
    with pytest.raises(DeepLabZooError):
        deeplabzoo.evaluate(net, "folder", root, "val", progress=False, engine=None)


def test_jpeg_masks_are_refused_where_their_numbers_are_classes(root: Path) -> None:
    """With many classes a blurred number is another class, which no check of numbers can find."""
    (root / "classes.txt").write_text("\n".join(f"class {number}" for number in range(255)) + "\n")
    for path in root.glob("*/masks/*.png"):
        Image.fromarray(NUMBERS).save(path.with_suffix(".jpg"))
        path.unlink()
    with pytest.raises(DataError, match="is a JPEG, which changes label numbers that lie close together; save it as PNG"):
        check_folder(root)


def test_the_command_leaves_with_1_and_one_line(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put(WRONG["colours"], root)
    assert prepare(["folder", "--root", str(root)]) == 1
    logged = capsys.readouterr().err.splitlines()
    assert [line.startswith("error: The mask '") for line in logged] == [True]


def test_names_of_any_kind_are_data(root: Path, net: DeepLab, tmp_path: Path) -> None:
    """Line breaks, terminal codes and dollar signs in the names of pictures and classes: read, scored and drawn."""
    (root / "classes.txt").write_text("_$ground^{_\n$\\\\frac{1}$ square\ndisc \u202f\u0915\u094d\u200d\u0937\n")
    for number, name in enumerate(("two\nlines", "\x1b[2Jred", "$x^{2$ _ \\frac{1}", "\u202egnp", "$_$")):
        for kind in ("images", "masks"):
            source = root / "val" / kind / f"val{number % 2}.png"
            (root / "val" / kind / f"{name}.png").write_bytes(source.read_bytes())
    assert "val: 7 images" in check_folder(root)
    data = build_dataset("folder", root, "val")
    worst = WorstImages(2, len(data.classes), data.ignore_index)
    report = deeplabzoo.evaluate(net, data, progress=False, engine=None, seen=worst.add)
    assert report.to_json()
    (tmp_path / "plots").mkdir()
    drawn = draw_plots(report, worst.ranked(), tmp_path / "plots", data_palette=data.palette)
    assert all(path.stat().st_size for path in drawn)


def read_labels(path: Path) -> np.ndarray:
    labels = map_labels(read_mask(path, max_pixels=1_000_000), default_label_map(len(CLASSES)), path)
    assert set(np.unique(labels).tolist()) <= {0, 1, 2, 255}
    return labels


TARGET = Target("labels", read_labels, list, file_name="a.png", seconds=STATED_SECONDS, mebibytes=STATED_MEBIBYTES)


def changed(tally: Tally, folder: Path, count: int, seed: int) -> None:
    """Read so many changed masks."""
    random_ = random.Random(seed)
    files = []
    for number, mask in enumerate(MASKS.values()):
        path = folder / f"{number}.png"
        mask.write(path)
        if path.is_file():
            files.append(path.read_bytes())
    for _ in range(count):
        tally.read(TARGET, mutated(random_.choice(files), random_), "mask")


@pytest.fixture(scope="module")
def tally(tmp_path_factory: pytest.TempPathFactory) -> Tally:
    return Tally(warmed(tmp_path_factory.mktemp("warm")), tmp_path_factory.mktemp("scratch"))


def test_changed_masks_are_labels_or_a_sentence(tally: Tally, tmp_path: Path) -> None:
    """Never a number that is no class, never another error."""
    changed(tally, tmp_path, 150, 0)
    assert not tally.verdict()


@pytest.mark.soak
@pytest.mark.timeout(7200)
def test_hostile_masks_in_full(tally: Tally, net: DeepLab, tmp_path: Path) -> None:
    """Every kind through every entrance, and twenty thousand changed masks; the record says so."""
    began = time.monotonic()
    failed: list[str] = []
    tried = refused = 0
    for number, (kind, mask) in enumerate(MASKS.items()):
        for entrance, logged in sentences(mask, write_folder(tmp_path / str(number)), net):
            tried += 1
            refused += logged is not None
            if (logged is None) != (kind in RIGHT):
                failed.append(f"{kind} through {entrance}: {logged}")
    scratch = tmp_path / "masks"
    scratch.mkdir()
    changed(tally, scratch, CHANGES, 1)
    inputs = tried + tally.inputs
    write_record(
        TrustRecord(
            name="hostile_masks",
            area="images",
            what="Masks of every wrong kind through the check of a folder, evaluation and training loader, and changed ones.",
            command="DEEPLABZOO_RECORD=1 python -m pytest -m soak tests/trust/test_hostile_masks.py",
            seconds=round(time.monotonic() - began, 1),
            inputs=inputs,
            faults=inputs,
            survived=inputs - len(failed) - len(tally.broken),
            details={
                "kinds": len(MASKS),
                "kinds_refused": len(WRONG),
                "through_entrances": tried,
                "changed": tally.inputs,
                "answered": tried - refused + tally.answered,
                "refused": refused + tally.refused,
                "slowest_s": round(tally.slowest_s, 2),
            },
        )
    )
    assert not failed
    assert not tally.verdict()
