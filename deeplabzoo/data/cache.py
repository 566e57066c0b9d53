"""Caches of decoded images, in memory or on disk: epochs after the first read pixels instead of JPEG and PNG.

Each wraps any SegmentationDataset and returns the same samples, read-only. Both are bounded in bytes; images that do not fit
are decoded every time, which is logged once.
"""

import hashlib
import mmap
import multiprocessing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
from filelock import FileLock, Timeout

from deeplabzoo.data.classes import Palette
from deeplabzoo.data.dataset import Sample, SegmentationDataset
from deeplabzoo.data.image_io import Labels
from deeplabzoo.errors import OutputError, UsageError
from deeplabzoo.files import ensure_folder, write_atomically
from deeplabzoo.log import logger

_HEADER = np.dtype([("magic", "S8"), ("height", "<i8"), ("width", "<i8"), ("label_bytes", "<i8")])
_MAGIC = b"dlzpixl1"
_LOCK_WAIT_S = 60
_ABSENT, _RESERVED = -1, -2

Bytes = npt.NDArray[np.uint8]


class _CachedDataset:
    """Base of both caches: everything but the reading is forwarded to the wrapped dataset."""

    def __init__(self, data: SegmentationDataset, limit_bytes: int) -> None:
        if limit_bytes < 1:
            raise UsageError(f"A cache of decoded images needs a limit above 0 bytes, not {limit_bytes}.")
        self.data, self.limit_bytes = data, limit_bytes

    @property
    def name(self) -> str:
        return self.data.name

    @property
    def split(self) -> str:
        return self.data.split

    @property
    def classes(self) -> tuple[str, ...]:
        return self.data.classes

    @property
    def palette(self) -> Palette:
        return self.data.palette

    @property
    def ignore_index(self) -> int:
        return self.data.ignore_index

    @property
    def names(self) -> tuple[str, ...]:
        return self.data.names

    def __len__(self) -> int:
        return len(self.data)

    def read_labels(self, index: int) -> Labels:
        """Read the labels alone, from the files: they are small, and a scan must not fill the cache with images."""
        return self.data.read_labels(index)

    def _log_full(self, kept: int, where: str) -> None:
        logger.info(
            f"cache: full, {kept} of {len(self)} images of {self.name} {self.split} fit {where} "
            f"({self.limit_bytes / 1e9:.3g} GB); the others are decoded each time."
        )


class MemoryCache(_CachedDataset):
    """Decoded images in memory that forked worker processes share; it grows as images are read, up to the limit.

    Where workers are not forked (Windows, macOS) their copies keep nothing, and say so: a disk cache serves them.
    """

    def __init__(self, data: SegmentationDataset, limit_bytes: int) -> None:
        super().__init__(data, limit_bytes)
        self._lock = multiprocessing.Lock()
        try:
            memory = mmap.mmap(-1, limit_bytes)  # shared with children; its pages are taken when they are written
        except (OSError, ValueError, OverflowError) as error:
            raise UsageError(
                f"A memory cache of {limit_bytes / 1e9:.3g} GB cannot be set up ({error}); lower cache_gb."
            ) from None
        self._pixels: Bytes | None = np.frombuffer(memory, np.uint8)
        entries = np.frombuffer(mmap.mmap(-1, max(1, 4 * 8 * (len(data) + 1))), np.int64).reshape(-1, 4)
        entries[:-1, 0] = _ABSENT
        self._entries, self._totals = entries[:-1], entries[-1]
        """A row an image: offset (or _ABSENT, _RESERVED), height, width, bytes a label. Totals: bytes used, kept, full."""

    def __getitem__(self, index: int) -> Sample:
        """Return the image from memory, or read it and keep it if there is room."""
        index = range(len(self))[index]
        if self._pixels is None:
            return self.data[index]
        with self._lock:
            start, height, width, label_bytes = self._entries[index].tolist()
        if start >= 0:
            size = height * width * (3 + label_bytes)
            return _sample(self._pixels[start : start + size], height, width, label_bytes, self.names[index])
        sample = self.data[index]
        self._store(index, sample)
        return sample

    def _store(self, index: int, sample: Sample) -> None:
        assert self._pixels is not None
        size = sample.image.nbytes + sample.labels.nbytes
        with self._lock:
            used, kept, full, _ = self._totals.tolist()
            fits = used + size <= self.limit_bytes
            wanted = self._entries[index, 0] == _ABSENT
            if wanted and fits:
                self._entries[index, 0] = _RESERVED
                self._totals[0] = used + -(-size // 8) * 8
                self._totals[1] = kept + 1
            elif wanted:
                self._totals[2] = 1
        if wanted and not fits and not full:
            self._log_full(kept, "into memory")
        if not (wanted and fits):
            return
        place = self._pixels[used : used + size]
        place[: sample.image.nbytes] = sample.image.reshape(-1)
        place[sample.image.nbytes :] = np.ascontiguousarray(sample.labels).reshape(-1).view(np.uint8)
        with self._lock:
            self._entries[index] = used, *sample.labels.shape, sample.labels.itemsize

    def __getstate__(self) -> dict[str, Any]:
        return {"data": self.data, "limit_bytes": self.limit_bytes}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.__dict__.update(state)
        self._pixels = None
        logger.info(
            "cache: this worker process was not forked and shares no memory; it decodes each time (cache=disk would serve it)."
        )


class DiskCache(_CachedDataset):
    """Decoded images in files of a folder that runs and processes share, each named after what it was decoded from.

    The name covers path, size and time of change of image and mask and how masks are read, so a changed file is another entry.
    Raises UsageError for data that does not lie in pairs of files, OutputError for a folder that cannot be written.
    """

    _SUFFIX: ClassVar = ".pixels"

    def __init__(self, data: SegmentationDataset, folder: Path, limit_bytes: int) -> None:
        super().__init__(data, limit_bytes)
        if not isinstance(getattr(data, "files", None), Mapping):
            raise UsageError(
                f"cache=disk keeps what was decoded from pairs of files, which {data.name} has not; take cache=memory."
            )
        ensure_folder(folder)
        self.folder, self._full = folder, False
        dataset: Any = data
        read = dataset.read_values
        reading = getattr(read, "__qualname__", None) or repr(read)  # a function by its name, a MaskReader by its fields
        self._label_map_key = repr((sorted(dataset.label_map.items()), reading))

    def __getitem__(self, index: int) -> Sample:
        """Return the image from its entry, or read it and write one if there is room."""
        index = range(len(self))[index]
        entry = self._entry(index)
        found = _read(entry, self.names[index])
        if found is not None:
            return found
        sample = self.data[index]
        if not self._full:
            self._store(entry, sample)
        return sample

    def _entry(self, index: int) -> Path:
        dataset: Any = self.data
        words = [self._label_map_key]
        for file in dataset.files[self.names[index]]:
            try:
                state = file.stat()
            except OSError:
                words.append(f"{file} missing")  # reading it says what is wrong
            else:
                words.append(f"{file.resolve()} {state.st_size} {state.st_mtime_ns}")
        return self.folder / (hashlib.sha256("\n".join(words).encode()).hexdigest()[:40] + self._SUFFIX)

    def _store(self, entry: Path, sample: Sample) -> None:
        header = np.array((_MAGIC, *sample.labels.shape, sample.labels.itemsize), _HEADER)
        parts = (header.tobytes(), sample.image.tobytes(), sample.labels.tobytes())
        try:
            with FileLock(self.folder / "lock", timeout=_LOCK_WAIT_S):
                others = [one for one in self.folder.iterdir() if one.suffix == self._SUFFIX]
                used = sum(one.stat().st_size for one in others)
                self._full = used + sum(map(len, parts)) > self.limit_bytes
                if not self._full:
                    write_atomically(entry, lambda file: file.writelines(parts))
        except (OSError, OutputError, Timeout) as error:
            self._full = True
            logger.info(f"cache: nothing more is kept in '{self.folder}' ({error}); images are decoded each time.")
            return
        if self._full:
            self._log_full(len({self._entry(index) for index in range(len(self))} & set(others)), f"into '{self.folder}'")


def _read(entry: Path, name: str) -> Sample | None:
    """Return an entry's image, or None where there is no whole entry; a copy, which later changes of the file do not affect."""
    try:
        content = np.fromfile(entry, np.uint8)
    except OSError:
        return None
    if content.size < _HEADER.itemsize:
        return None
    magic, height, width, label_bytes = content[: _HEADER.itemsize].view(_HEADER)[0].tolist()
    pixels = content[_HEADER.itemsize :]
    if magic != _MAGIC or pixels.size != height * width * (3 + label_bytes):
        return None
    return _sample(pixels, height, width, label_bytes, name)


def _sample(pixels: Bytes, height: int, width: int, label_bytes: int, name: str) -> Sample:
    image = pixels[: 3 * height * width].reshape(height, width, 3)
    labels = np.frombuffer(pixels[3 * height * width :], np.dtype(f"u{label_bytes}")).reshape(height, width)
    image.flags.writeable = labels.flags.writeable = False
    return Sample(image, labels, name)
