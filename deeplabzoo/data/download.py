"""Download of VOC 2012 and SBD from their publishers, verified and unpacked, and conversion of SBD to `trainaug`."""

import bz2
import gzip
import hashlib
import io
import os
import stat
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, cast

import numpy as np
from PIL import Image

from deeplabzoo.data.classes import class_list, default_palette
from deeplabzoo.data.dataset import read_list, split_hash
from deeplabzoo.data.datasets.published import find_voc_root
from deeplabzoo.data.image_io import Labels
from deeplabzoo.errors import DataError, DownloadError, OutputError, UsageError
from deeplabzoo.log import logger

# The inside of a tar archive as a file that reads no more at once, and leads no further, than an honest archive needs.


_MAX_READ = 16 << 20
"""Most bytes that tarfile may ask for at once: it reads the long names and extra headers of an entry whole."""


class TarStream:
    """A tar file, unpacked as it is read; raises ReadError beyond `max_bytes` of it, or for too much at once.

    A megabyte of gzip may hold a header of a gigabyte, or hours of zeros before the first name that is wanted.
    """

    def __init__(self, path: Path, max_bytes: int) -> None:
        self._file, self._max_bytes = _open(path), max_bytes

    def read(self, count: int = -1) -> bytes:
        """Read at most `count` bytes, which must be given."""
        if not 0 <= count <= _MAX_READ:
            raise tarfile.ReadError("a header in it is too long")
        return self._file.read(count)

    def tell(self) -> int:
        """Return the position in the unpacked tar."""
        return self._file.tell()

    def seek(self, position: int) -> int:
        """Go on at a position, which is read up to where the file is compressed."""
        if position > self._max_bytes:
            raise tarfile.ReadError(f"it goes on beyond {self._max_bytes} bytes")
        return self._file.seek(position)

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _open(path: Path) -> IO[bytes]:
    """Open a file, through gzip or bzip2 where it begins as they do; xz may take gigabytes of memory to unpack a few bytes."""
    with path.open("rb") as file:
        head = file.read(3)
    if head[:2] == b"\x1f\x8b":
        return gzip.open(path)  # type: ignore[return-value]
    return bz2.open(path) if head == b"BZh" else path.open("rb")


# Archives come from hosts that may be compromised: the hash is checked, then one folder is unpacked, whole or not at all.


Download = Callable[[str, Path], object]
"""Fetches an address into a file, going on where an earlier attempt stopped; given by the caller, raises DownloadError."""

_BLOCK_BYTES = 1 << 20
_MAX_FILES = 500_000
_MAX_DEPTH = 64
"""Folders in folders."""
_MAX_FOLDERS_ABOVE = 4
"""Times the size of what is wanted that the whole archive may have unpacked."""
_COMPRESSIONS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2)
"""Of zip files; LZMA may take gigabytes of memory to unpack a few bytes."""
_ARCHIVE_ERRORS = (tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, NotImplementedError)


@dataclass(frozen=True)
class Archive:
    """One published file: where to get it, what it must hash to, and which folder of it is wanted."""

    urls: tuple[str, ...]
    """Where it is, the first place that answers wins."""
    file_name: str
    md5: str
    """As published; md5 finds damage, and is the only hash that these hosts ever gave."""
    folder: str
    """The folder inside, with forward slashes, whose contents are unpacked."""
    max_bytes: int
    """Unpacked size beyond which it cannot be the real one."""


def fetch_archive(archive: Archive, target: Path, download: Download, *, archive_dir: Path) -> None:
    """Make `target` hold the archive's folder: download into `archive_dir` unless it is there already, verify, unpack.

    Raises DownloadError if the file fails its hash (it is then removed, so that the next attempt starts afresh) or is unsafe;
    OutputError where the disk refuses.
    """
    file = archive_dir / archive.file_name
    try:
        if not file.exists():
            archive_dir.mkdir(parents=True, exist_ok=True)
            _download_from_any(archive.urls, file, download)
        found = _md5(file)
        if found != archive.md5:
            file.unlink()
    except OSError as error:
        raise OutputError(f"'{file}' could not be written: {error.strerror or error}.") from None
    if found != archive.md5:
        raise DownloadError(
            f"'{file}' has md5 {found}, expected {archive.md5}; it was removed; run again to get it from {archive.urls[0]}."
        )
    extract_folder(file, archive.folder, target, max_bytes=archive.max_bytes)


def _download_from_any(urls: tuple[str, ...], file: Path, download: Download) -> None:
    for url in urls[:-1]:
        try:
            download(url, file)
        except DownloadError as error:
            logger.info(f"{error} Trying the next place.")
        else:
            return
    download(urls[-1], file)


def extract_folder(archive: Path, folder: str, target: Path, *, max_bytes: int) -> None:
    """Unpack what lies under `folder` of a tar or zip file to `target`, which appears complete or not at all.

    Raises DownloadError for anything that an image dataset has no need of: names that lead out of the target, links, devices,
    more than `max_bytes` unpacked; or a damaged archive, or one without the folder. Raises OutputError if `target` exists
    or cannot be written.
    """
    if target.exists():
        raise OutputError(f"'{target}' exists already; move it away to unpack '{archive.name}' afresh.")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as scratch:
            unpacked = Path(scratch) / "unpacked"
            _unpack(archive, PurePosixPath(folder), unpacked, max_bytes)
            os.replace(unpacked, target)
    except OSError as error:
        raise OutputError(f"'{archive.name}' could not be unpacked into '{target}': {error.strerror or error}.") from None


def _unpack(archive: Path, folder: PurePosixPath, unpacked: Path, max_bytes: int) -> None:
    files = left_bytes = 0
    try:
        with _members(archive, _MAX_FOLDERS_ABOVE * max_bytes) as members:
            for name, source in members:
                inside = _safe_name(name, archive)
                if not inside.is_relative_to(folder) or inside == folder:
                    continue
                if source is None:
                    raise DownloadError(
                        f"'{archive.name}' holds '{name}', which is a link or a device and not a file; refused."
                    )
                files += 1
                path = unpacked / inside.relative_to(folder)
                path.parent.mkdir(parents=True, exist_ok=True)
                with path.open("xb") as sink:
                    while block := source.read(_BLOCK_BYTES):
                        left_bytes += len(block)
                        if left_bytes > max_bytes or files > _MAX_FILES:
                            raise DownloadError(f"'{archive.name}' unpacks to more than {max_bytes} bytes; refused.")
                        sink.write(block)
    except FileExistsError as error:
        raise DownloadError(f"'{archive.name}' holds '{Path(error.filename).name}' twice; refused.") from None
    except _ARCHIVE_ERRORS as error:
        raise DownloadError(f"'{archive.name}' is damaged or not an archive: {error}.") from None
    if not files:
        raise DownloadError(f"'{archive.name}' has no folder '{folder}'; it is not the archive that was expected.")


Members = Iterator[tuple[str, IO[bytes] | None]]


@contextmanager
def _members(archive: Path, max_tar_bytes: int) -> Iterator[Members]:
    """Give (name, open file) of every member but folders; None instead of a file for links and devices."""
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as zipped:
            yield _zip_members(zipped)
    else:
        with (
            closing(TarStream(archive, max_tar_bytes)) as stream,
            tarfile.open(fileobj=cast(IO[bytes], stream), mode="r:") as tar,
        ):
            yield _tar_members(tar)


def _tar_members(tar: tarfile.TarFile) -> Members:
    for member in tar:
        if member.size < 0:
            raise tarfile.ReadError("a size in it is below 0")
        if not member.isdir():
            yield member.name, tar.extractfile(member) if member.isreg() else None


def _zip_members(zipped: zipfile.ZipFile) -> Members:
    for member in zipped.infolist():
        if member.is_dir():
            continue
        if member.compress_type not in _COMPRESSIONS:
            raise zipfile.BadZipFile("it is compressed in a way that is not read")
        kind = stat.S_IFMT(member.external_attr >> 16)
        if kind not in (0, stat.S_IFREG):
            yield member.filename, None
            continue
        with zipped.open(member) as source:
            yield member.filename, source


def _safe_name(name: str, archive: Path) -> PurePosixPath:
    path = PurePosixPath(name)
    if len(path.parts) > _MAX_DEPTH:
        raise DownloadError(f"'{archive.name}' holds folders more than {_MAX_DEPTH} deep; refused.")
    if path.is_absolute() or ".." in path.parts or any(sign in name for sign in "\\:\0"):
        raise DownloadError(f"'{archive.name}' holds the name '{name}', which leads out of its folder; refused.")
    return path


def _md5(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


# VOC 2012 with the labels of the Semantic Boundaries Dataset: the 10582 images, `trainaug`, on which the papers train.
#
# SBD labels 11355 images of VOC 2011, among them images of VOC 2012's val: training on SBD's own lists is training on the
# test (zhanghang1989/PyTorch-Encoding#220). `trainaug` is SBD's train and val plus VOC's train, less VOC's val. VOC's own masks
# serve where they exist: they are finer, and mark the doubtful border as void, which SBD does not.


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


VOC_2012 = Archive(
    urls=(
        "http://host.robots.ox.ac.uk/pascal/VOC/voc2012/VOCtrainval_11-May-2012.tar",
        "https://thor.robots.ox.ac.uk/pascal/VOC/voc2012/VOCtrainval_11-May-2012.tar",
    ),
    file_name="VOCtrainval_11-May-2012.tar",
    md5="6cd6e144f989b92b3379bac3b3de84fd",
    folder="VOCdevkit/VOC2012",
    max_bytes=4 << 30,
)
"""2 GB. VOC publishes no hash; this md5 is the one against which torchvision checks downloads (datasets/voc.py)."""

SBD = Archive(
    urls=("https://www2.eecs.berkeley.edu/Research/Projects/CS/vision/grouping/semantic_contours/benchmark.tgz",),
    file_name="benchmark.tgz",
    md5="82b4d87ceb2ed10f6038a1cba92111cb",
    folder="benchmark_RELEASE/dataset",
    max_bytes=8 << 30,
)
"""1.4 GB. The md5 is torchvision's, too (datasets/sbd.py)."""

ARCHIVES = "archives"
"""The folder below the root in which archives are kept; it may be deleted afterwards."""


def prepare_voc(root: Path, download: Download, archive: Archive = VOC_2012) -> Path:
    """Return the folder VOC2012 below `root`, downloaded and unpacked first if it is not there."""
    try:
        home = find_voc_root(root)
    except DataError:
        home = root / "VOCdevkit" / "VOC2012"
        fetch_archive(archive, home, download, archive_dir=root / ARCHIVES)
        logger.info(f"VOC 2012 is in '{home}'; its archive in '{root / ARCHIVES}' may be deleted.")
    return home


def prepare_trainaug(
    root: Path, download: Download, voc: Archive = VOC_2012, sbd: Archive = SBD, expected: SplitInfo = TRAINAUG
) -> Path:
    """Return the folder VOC2012 with `trainaug` in it: VOC, then SBD into `root/SBD`, then its masks as PNG (make_trainaug)."""
    home = prepare_voc(root, download, voc)
    if (home / "ImageSets" / "Segmentation" / "trainaug.txt").is_file() and (home / "SegmentationClassAug").is_dir():
        return home
    if not (root / "SBD").is_dir():
        fetch_archive(sbd, root / "SBD", download, archive_dir=root / ARCHIVES)
    make_trainaug(home, root / "SBD", expected)
    return home
