"""VOC 2012 with the labels of the Semantic Boundaries Dataset: the 10582 images, `trainaug`, on which the papers train.

SBD labels 11355 images of VOC 2011, among them images of VOC 2012's val: training on SBD's own lists is training on the
test (zhanghang1989/PyTorch-Encoding#220). `trainaug` is SBD's train and val plus VOC's train, less VOC's val. VOC's own masks
serve where they exist: they are finer, and mark the doubtful border as void, which SBD does not.
"""

import io
import os
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from deeplabzoo.data.classes import class_list
from deeplabzoo.data.image_io import Labels
from deeplabzoo.data.palettes import default_palette
from deeplabzoo.data.splits import read_list, split_hash
from deeplabzoo.errors import DataError, UsageError
from deeplabzoo.log import logger

LISTS = Path("ImageSets", "Segmentation")
MASKS = "SegmentationClassAug"


@dataclass(frozen=True)
class SplitInfo:
    """What a split must be: its length, and the SHA-256 of its sorted names, one a line."""

    count: int
    sha256: str


TRAINAUG = SplitInfo(10582, "855dff350b7f447bf43cb98ea626a32e0d0b3b7c5786e03b2712a21355b635bf")
"""Facts of the list that the field has passed around since DeepLab's first release."""


def trainaug_names(voc_train: Collection[str], voc_val: Collection[str], sbd: Collection[str]) -> list[str]:
    """Return the sorted names of `trainaug` from VOC's two lists and all of SBD's names.

    >>> trainaug_names(["a"], ["b"], ["b", "c"])
    ['a', 'c']
    """
    return sorted((set(sbd) | set(voc_train)) - set(voc_val))


def check_trainaug(names: Collection[str], voc_val: Collection[str], expected: SplitInfo = TRAINAUG) -> None:
    """Raise DataError unless these are the expected names and none of them is a val image."""
    leaked = sorted(set(names) & set(voc_val))
    if leaked:
        raise DataError(
            f"trainaug holds {len(leaked)} images of VOC's val, the first '{leaked[0]}'; drop them before training."
        )
    found = SplitInfo(len(names), split_hash(names))
    if found != expected:
        raise DataError(
            f"trainaug has {found.count} names with sha256 {found.sha256[:16]}…, expected {expected.count} with "
            f"{expected.sha256[:16]}…; check that train.txt and val.txt of VOC and of SBD are the original ones."
        )


def make_trainaug(voc: Path, sbd: Path, expected: SplitInfo = TRAINAUG) -> None:
    """Write `SegmentationClassAug/*.png` and `ImageSets/Segmentation/trainaug.txt` into the folder `voc` (`.../VOC2012`).

    `sbd` is the unpacked benchmark: the folder with `cls/`, `train.txt` and `val.txt`, or one that contains it. Masks that
    exist already are kept, so an interrupted conversion goes on; the list is written last. Needs scipy (the `train` extra).
    Raises DataError when a list is not the original one, or an image or mask is missing or damaged.
    """
    sbd = _sbd_folder(sbd)
    train, val = (_list(voc / LISTS / f"{split}.txt") for split in ("train", "val"))
    names = trainaug_names(train, val, _list(sbd / "train.txt") + _list(sbd / "val.txt"))
    check_trainaug(names, val, expected)
    (voc / MASKS).mkdir(exist_ok=True)
    own = set(train)
    logger.info(
        f"{len(names)} masks of trainaug: {len(own)} of VOC, {len(names) - len(own)} converted from SBD into '{voc / MASKS}'."
    )
    for name in names:
        target = voc / MASKS / f"{name}.png"
        if target.exists():
            continue
        image_file, source = voc / "JPEGImages" / f"{name}.jpg", voc / "SegmentationClass" / f"{name}.png"
        if not image_file.is_file():
            raise DataError(f"'{image_file}' is missing; trainaug needs all images of VOC 2012's trainval archive.")
        if name not in own:
            _write(target, _palette_png(read_sbd_mask(sbd / "cls" / f"{name}.mat"), image_file))
        elif source.is_file():
            _write(target, source.read_bytes())
        else:
            raise DataError(f"'{source}' is missing; trainaug needs all masks of VOC 2012's trainval archive.")
    _write(voc / LISTS / "trainaug.txt", "".join(f"{name}\n" for name in names).encode())


def read_sbd_mask(file: Path) -> Labels:
    """Return the labels (uint8, H x W, 0 to 20) of one of SBD's `cls/*.mat`; DataError if it is missing or not such a file."""
    try:
        from scipy import io as matlab
    except ImportError:
        raise UsageError("Reading SBD's .mat files needs scipy: pip install 'deeplabzoo[train]'.") from None
    try:
        with file.open("rb") as opened:
            content = matlab.loadmat(opened, variable_names=["GTcls"])  # type: ignore[no-untyped-call,attr-defined,unused-ignore]
        labels = np.asarray(content["GTcls"]["Segmentation"][0, 0])
    except FileNotFoundError:
        raise DataError(f"'{file}' is missing; unpack SBD's benchmark.tgz afresh.") from None
    except Exception as error:  # scipy's reader fails in many ways on damaged files
        raise DataError(f"'{file}' is not one of SBD's class masks (GTcls.Segmentation): {error}.") from None
    classes = class_list("voc").num_classes
    if labels.ndim != 2 or labels.dtype.kind not in "ui" or labels.size == 0 or labels.max() >= classes or labels.min() < 0:
        raise DataError(f"'{file}' should hold labels from 0 to {classes - 1} in height x width, but does not.")
    return labels.astype(np.uint8)


def _palette_png(labels_HW: Labels, image_file: Path) -> bytes:
    with Image.open(image_file) as opened:
        width, height = opened.size
    if labels_HW.shape != (height, width):
        raise DataError(f"SBD's mask of '{image_file.name}' is {labels_HW.shape}, the image {(height, width)} (height, width).")
    image = Image.fromarray(labels_HW).convert("P")
    image.putpalette([level for colour in default_palette(256) for level in colour])
    sink = io.BytesIO()
    image.save(sink, "PNG")
    return sink.getvalue()


def _sbd_folder(root: Path) -> Path:
    for folder in (root, root / "dataset", root / "benchmark_RELEASE" / "dataset", root / "SBD"):
        if (folder / "cls").is_dir():
            return folder
    raise DataError(f"'{root}' is not the Semantic Boundaries Dataset; expected a folder with cls/, train.txt and val.txt.")


def _list(file: Path) -> list[str]:
    if not file.is_file():
        raise DataError(f"'{file}' is missing; trainaug is made from the train and val lists of VOC and of SBD.")
    return read_list(file)


def _write(target: Path, content: bytes) -> None:
    scratch = target.with_name(f".{target.name}.{os.getpid()}")
    scratch.write_bytes(content)
    os.replace(scratch, target)
