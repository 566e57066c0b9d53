"""Training input per core: from JPEG and mask to a normalized crop, against torchvision's reference transforms.

The reference recipe for segmentation resizes the whole image, flips, pads, crops and normalizes it; it is implemented here on
Pillow images and on tensors. All sides get the same random numbers, so that outputs can be compared pixel by pixel, and return
the same tensors: float32 images and int64 labels. Our time includes normalization and collation, the peers' no collation.
"""

import multiprocessing
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from PIL import Image

from deeplabzoo.benchmark.models import write_synthetic_voc
from deeplabzoo.benchmark.record import Row, Spread
from deeplabzoo.benchmark.timing import interleave_timings, time_call
from deeplabzoo.data.cache import MemoryCache
from deeplabzoo.data.dataset import SegmentationDataset, build_dataset
from deeplabzoo.data.transforms import Augmentation, augment, normalize_images
from deeplabzoo.errors import DataError, UsageError
from deeplabzoo.models.config import Preprocessing
from deeplabzoo.optimization.cpu_runtime import keep_freed_memory

PIL_PEER, TENSOR_PEER = "torchvision references (PIL)", "torchvision references (v2 tensors)"
OURS, OURS_CACHED = "deeplabzoo", "deeplabzoo, decoded cache"
BATCH = 8
NORMAL = Preprocessing()
_SCALE = (0.5, 2.0)
_VOID = 255

Example = tuple[torch.Tensor, torch.Tensor]
"""Normalised float32 image (CHW) and int64 labels (HW)."""


@dataclass(frozen=True)
class CropParams:
    """Random parameters of one image: its size after scaling, the corner of the crop, and whether it is flipped."""

    scaled_hw: tuple[int, int]
    top: int
    left: int
    flip: bool

    @classmethod
    def of(cls, hw: tuple[int, ...], crop: int, generator: np.random.Generator) -> "CropParams":
        """Draw the values as `augment` does; the corner is that in the flipped image."""
        u_scale, u_top, u_left, u_flip = generator.random(10)[:4].tolist()
        scale = _SCALE[0] + (_SCALE[1] - _SCALE[0]) * u_scale
        height, width = round(hw[0] * scale), round(hw[1] * scale)
        room = max(0, width - crop)
        left = int(u_left * (room + 1))
        return cls(
            (height, width), int(u_top * (max(0, height - crop) + 1)), room - left if u_flip < 0.5 else left, u_flip < 0.5
        )


class Pipeline:
    """The same images with the same random numbers, prepared by each side."""

    def __init__(self, data: SegmentationDataset, count: int, crop: int, seed: int) -> None:
        files: Any = getattr(data, "files", None)
        if files is None:
            raise DataError(f"{data.name} has no pairs of image and mask files, which this benchmark reads.")
        self.data, self.crop, self.seed = data, crop, seed
        self.indices = range(min(count, len(data)))
        self.files: list[tuple[Path, Path]] = [files[data.names[index]] for index in self.indices]
        self.cached = MemoryCache(data, sum(4 * np.prod(Image.open(image).size).item() + 64 for image, _ in self.files))
        self.augmentation = Augmentation(crop=(crop, crop), scale=_SCALE)

    @classmethod
    def of_voc(cls, root: Path, count: int, crop: int, seed: int) -> Self:
        """Open the val split of PASCAL VOC; raises DataError if it cannot be read."""
        return cls(build_dataset("voc", root, "val"), count, crop, seed)

    @property
    def sides(self) -> Mapping[str, Callable[[], Iterator[Example]]]:
        """Name of a side -> function that prepares all images."""
        return {
            OURS: lambda: self.ours(self.data),
            OURS_CACHED: lambda: self.ours(self.cached),
            PIL_PEER: self.pillow,
            TENSOR_PEER: self.tensors,
        }

    def generator(self, index: int) -> np.random.Generator:
        """Return the random generator of an image, the same for every side."""
        return np.random.default_rng([self.seed, index])

    def ours(self, data: SegmentationDataset) -> Iterator[Example]:
        """Prepare batches as the training data loader does, and normalize them as the train step does."""
        for start in range(0, len(self.indices), BATCH):
            indices = self.indices[start : start + BATCH]
            images_BHWC = np.empty((len(indices), self.crop, self.crop, 3), np.uint8)
            labels = [self._crop(data, index, out) for index, out in zip(indices, images_BHWC, strict=True)]
            labels_BHW = torch.from_numpy(np.stack(labels)).long()
            yield from zip(normalize_images(torch.from_numpy(images_BHWC).permute(0, 3, 1, 2), NORMAL), labels_BHW, strict=True)

    def _crop(self, data: SegmentationDataset, index: int, out_HWC: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        generator = self.generator(index)
        sample = data[index]
        return augment(sample, self.augmentation, generator, mean_fill=(0, 0, 0), ignore_index=_VOID, out_HWC=out_HWC)[1]

    def pillow(self) -> Iterator[Example]:
        """Prepare images with the reference transforms on Pillow images."""
        from torchvision.transforms import InterpolationMode
        from torchvision.transforms import functional as functions

        their: Any = functions  # accepts Pillow images, which its annotations omit
        for index, (image_file, mask_file) in zip(self.indices, self.files, strict=True):
            image: Any = Image.open(image_file).convert("RGB")
            mask: Any = Image.open(mask_file)
            draw = CropParams.of((image.height, image.width), self.crop, self.generator(index))
            image = their.resize(image, list(draw.scaled_hw), antialias=True)
            mask = their.resize(mask, list(draw.scaled_hw), interpolation=InterpolationMode.NEAREST)
            if draw.flip:
                image, mask = their.hflip(image), their.hflip(mask)
            bottom, right = (max(0, self.crop - side) for side in draw.scaled_hw)
            if bottom or right:
                image, mask = (their.pad(one, [0, 0, right, bottom], fill=fill) for one, fill in ((image, 0), (mask, _VOID)))
            image, mask = (their.crop(one, draw.top, draw.left, self.crop, self.crop) for one in (image, mask))
            image_CHW = their.convert_image_dtype(their.pil_to_tensor(image), torch.float32)
            yield (
                their.normalize(image_CHW, list(NORMAL.mean), list(NORMAL.std)),
                torch.as_tensor(np.array(mask), dtype=torch.int64),
            )

    def tensors(self) -> Iterator[Example]:
        """Prepare images with the reference transforms v2 on tensors."""
        from torchvision.transforms import InterpolationMode
        from torchvision.transforms.v2 import functional as functions

        their: Any = functions  # torchvision re-exports names implicitly, which mypy refuses
        for index, (image_file, mask_file) in zip(self.indices, self.files, strict=True):
            image_CHW = their.pil_to_tensor(Image.open(image_file).convert("RGB"))
            mask_1HW = torch.from_numpy(np.array(Image.open(mask_file)))[None]
            draw = CropParams.of(tuple(image_CHW.shape[1:]), self.crop, self.generator(index))
            image_CHW = their.resize(image_CHW, list(draw.scaled_hw), antialias=True)
            mask_1HW = their.resize(mask_1HW, list(draw.scaled_hw), interpolation=InterpolationMode.NEAREST)
            if draw.flip:
                image_CHW, mask_1HW = their.horizontal_flip(image_CHW), their.horizontal_flip(mask_1HW)
            bottom, right = (max(0, self.crop - side) for side in draw.scaled_hw)
            if bottom or right:
                image_CHW = their.pad(image_CHW, [0, 0, right, bottom], fill=0)
                mask_1HW = their.pad(mask_1HW, [0, 0, right, bottom], fill=_VOID)
            image_CHW = their.crop(image_CHW, draw.top, draw.left, self.crop, self.crop)
            mask_1HW = their.crop(mask_1HW, draw.top, draw.left, self.crop, self.crop)
            image_CHW = their.to_dtype(image_CHW, torch.float32, scale=True)
            yield their.normalize(image_CHW, list(NORMAL.mean), list(NORMAL.std)), mask_1HW[0].long()


class BackendProcess:
    """A side on one thread of its own process, so that allocator settings stay separate (a context manager).

    `given` are the arguments of `Pipeline.of_voc`.
    """

    def __init__(self, side: str, given: tuple[Path, int, int, int]) -> None:
        context = multiprocessing.get_context("spawn")
        self._ours, theirs = context.Pipe()
        self._side = side
        self._process = context.Process(target=_serve, args=(side, given, theirs), daemon=True)
        self._process.start()
        theirs.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._ours.close()
        self._process.join()

    def time_call(self) -> float:
        """Return milliseconds of one pass; raises UsageError if the process died."""
        try:
            self._ours.send("run")
            return float(self._ours.recv())
        except (EOFError, OSError):
            raise UsageError(f"The process of {self._side} ended early; its error is printed above.") from None


def _serve(side: str, given: tuple[Path, int, int, int], connection: Connection) -> None:
    torch.set_num_threads(1)
    if side in (OURS, OURS_CACHED):
        keep_freed_memory()
    make = Pipeline.of_voc(*given).sides[side]
    while True:
        try:
            connection.recv()
        except EOFError:
            return
        connection.send(time_call(lambda: drain(make())))


def drain(made: Iterable[Example]) -> None:
    """Exhaust an iterator."""
    for _ in made:
        pass


TASK = "training input"


def measure_data(root: Path | None, *, pairs: int = 7, images: int = 32, crop: int = 513, seed: int = 0) -> list[Row]:
    """Return rows of ours, with and without the cache of decoded images, against both peers; milliseconds per image.

    Args:
        root: Folder of PASCAL VOC, whose val split is read; None generates images of VOC's size.
        pairs: Interleaved runs of each side.
        images: Number of images.
        crop: Side of the crop in pixels.
        seed: Of generated images and random parameters.

    Raises:
        DataError: The dataset cannot be read.
    """
    with ExitStack() as stack:
        if root is None:
            root = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            write_synthetic_voc(root, train=1, val=images, seed=seed)
        stack.enter_context(_one_thread())
        given = (root, images, crop, seed)
        work = Pipeline.of_voc(*given)
        count, sides = len(work.indices), work.sides
        with ExitStack() as running:
            timers = {side: running.enter_context(BackendProcess(side, given)).time_call for side in sides}
            times = interleave_timings(timers, pairs, name=TASK)
        ms = {name: [one / count for one in values] for name, values in times.items()}
        shares = _stages(work)
        rows = []
        for side in (OURS, OURS_CACHED):
            for peer in (PIL_PEER, TENSOR_PEER):
                grey, equal = _difference(sides[side](), sides[peer]())
                figures = {
                    "images_per_s": 1000 / Spread.of(ms[side]).median,
                    "peer_images_per_s": 1000 / Spread.of(ms[peer]).median,
                    "largest_grey_difference": grey,
                    **(shares if side == OURS else {}),
                }
                rows.append(
                    Row.paired(
                        ms[side],
                        ms[peer],
                        name="JPEG + mask -> normalized crop",
                        task=TASK,
                        side=side,
                        peer=peer,
                        threads=1,
                        size=(crop, crop),
                        agreement=equal,
                        figures=figures,
                        note=f"{count} images, scaled by 0.5-2, the same random numbers on every side",
                    )
                )
        return rows


def _difference(ours: Iterable[Example], theirs: Iterable[Example]) -> tuple[float, float]:
    """Return the largest difference of two sides' images in grey levels, and the share of equal labels."""
    largest, equal, pixels = 0.0, 0, 0
    grey_C11 = 255 * torch.tensor(NORMAL.std).view(3, 1, 1)
    for (image, labels), (their_image, their_labels) in zip(ours, theirs, strict=True):
        largest = max(largest, float(((image - their_image).abs() * grey_C11).max()))
        equal += int((labels == their_labels).sum())
        pixels += labels.numel()
    return largest, equal / pixels


def _stages(work: Pipeline) -> dict[str, float]:
    """Return the shares of our time: reading files, cropping, normalizing."""
    started = time.perf_counter()
    samples = [work.data[index] for index in work.indices]
    read = time.perf_counter() - started
    started = time.perf_counter()
    drain(work.ours(work.cached))
    rest = time.perf_counter() - started
    batch = torch.zeros(min(BATCH, len(samples)), 3, work.crop, work.crop, dtype=torch.uint8)
    batch = batch.contiguous(memory_format=torch.channels_last)
    normalize_images(batch, NORMAL)
    started = time.perf_counter()
    normalize_images(batch, NORMAL)
    normalise = (time.perf_counter() - started) * len(samples) / len(batch)
    whole = read + rest
    return {
        "read_share": read / whole,
        "crop_share": (rest - normalise) / whole,
        "normalise_share": normalise / whole,
    }


@contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
