"""How fast a core makes training input: from JPEG and mask to a normalised crop, against torchvision's reference transforms.

The references' recipe for segmentation resizes the whole picture by Pillow, mirrors, pads, crops, and makes a normalised float
tensor of it; it is written anew here, once on Pillow images and once on tensors. All sides are given the same draws, so their
outputs can be compared pixel by pixel, and all end with the same tensors: float32 images and int64 labels. Ours counts the
normalisation that the training step does, and the collation into a batch, which the others are spared.
"""

import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from deeplabzoo.benchmarking.photos import write_photos
from deeplabzoo.benchmarking.record import Row, Spread
from deeplabzoo.benchmarking.turns import in_turns
from deeplabzoo.data.base import SegmentationData, open_data
from deeplabzoo.data.decoded_cache import MemoryCache
from deeplabzoo.data.transforms import Augmentation, augment
from deeplabzoo.errors import DataError
from deeplabzoo.models.config import Preprocessing
from deeplabzoo.train.stream import normalised

TASK = "training input"
PIL_PEER, TENSOR_PEER = "torchvision references (PIL)", "torchvision references (v2 tensors)"
OURS, OURS_CACHED = "deeplabzoo", "deeplabzoo, decoded cache"
_SCALE = (0.5, 2.0)
_VOID = 255
_BATCH = 8
_NORMAL = Preprocessing()

Made = tuple[torch.Tensor, torch.Tensor]
"""Normalised float32 image (CHW) and int64 labels (HW)."""


@dataclass(frozen=True)
class _Draw:
    """What chance decided for one picture: the size it is brought to, the crop's corner in it, and whether it is mirrored."""

    scaled_hw: tuple[int, int]
    top: int
    left: int
    flip: bool

    @classmethod
    def of(cls, hw: tuple[int, ...], crop: int, generator: np.random.Generator) -> "_Draw":
        """Read the values as `augment` reads them, and turn the corner to where it lies in a mirrored picture."""
        u_scale, u_top, u_left, u_flip = generator.random(10)[:4].tolist()
        scale = _SCALE[0] + (_SCALE[1] - _SCALE[0]) * u_scale
        height, width = round(hw[0] * scale), round(hw[1] * scale)
        room = max(0, width - crop)
        left = int(u_left * (room + 1))
        return cls(
            (height, width), int(u_top * (max(0, height - crop) + 1)), room - left if u_flip < 0.5 else left, u_flip < 0.5
        )


class _Pipeline:
    """The same pictures with the same draws, made by each side."""

    def __init__(self, data: SegmentationData, count: int, crop: int, seed: int) -> None:
        files: Any = getattr(data, "files", None)
        if files is None:
            raise DataError(f"{data.name} does not lie in pairs of image and mask files, which this benchmark reads.")
        self.data, self.crop, self.seed = data, crop, seed
        self.indices = range(min(count, len(data)))
        self.files: list[tuple[Path, Path]] = [files[data.names[index]] for index in self.indices]
        self.cached = MemoryCache(data, sum(4 * np.prod(Image.open(image).size).item() + 64 for image, _ in self.files))
        self.augmentation = Augmentation(crop=(crop, crop), scale=_SCALE)

    def generator(self, index: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, index])

    def ours(self, data: SegmentationData) -> Iterator[Made]:
        """Make batches as the training stream does, and normalise them as the training step does."""
        for start in range(0, len(self.indices), _BATCH):
            indices = self.indices[start : start + _BATCH]
            images_BHWC = np.empty((len(indices), self.crop, self.crop, 3), np.uint8)
            labels = [self._crop(data, index, out) for index, out in zip(indices, images_BHWC, strict=True)]
            labels_BHW = torch.from_numpy(np.stack(labels)).long()
            yield from zip(normalised(torch.from_numpy(images_BHWC).permute(0, 3, 1, 2), _NORMAL), labels_BHW, strict=True)

    def _crop(self, data: SegmentationData, index: int, out_HWC: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        generator = self.generator(index)
        sample = data[index]
        return augment(sample, self.augmentation, generator, mean_fill=(0, 0, 0), ignore_index=_VOID, out_HWC=out_HWC)[1]

    def pillow(self) -> Iterator[Made]:
        """Make pictures as the references do on Pillow images."""
        from torchvision.transforms import InterpolationMode
        from torchvision.transforms import functional as functions

        their: Any = functions  # takes Pillow images as well, which its annotations leave out
        for index, (image_file, mask_file) in zip(self.indices, self.files, strict=True):
            image: Any = Image.open(image_file).convert("RGB")
            mask: Any = Image.open(mask_file)
            draw = _Draw.of((image.height, image.width), self.crop, self.generator(index))
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
                their.normalize(image_CHW, list(_NORMAL.mean), list(_NORMAL.std)),
                torch.as_tensor(np.array(mask), dtype=torch.int64),
            )

    def tensors(self) -> Iterator[Made]:
        """Make pictures as the references do with transforms v2 on tensors."""
        from torchvision.transforms import InterpolationMode
        from torchvision.transforms.v2 import functional as functions

        their: Any = functions  # it hands on names without declaring it, which a type checker takes for a slip
        for index, (image_file, mask_file) in zip(self.indices, self.files, strict=True):
            image_CHW = their.pil_to_tensor(Image.open(image_file).convert("RGB"))
            mask_1HW = torch.from_numpy(np.array(Image.open(mask_file)))[None]
            draw = _Draw.of(tuple(image_CHW.shape[1:]), self.crop, self.generator(index))
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
            yield their.normalize(image_CHW, list(_NORMAL.mean), list(_NORMAL.std)), mask_1HW[0].long()


def measure_data(root: Path | None, *, pairs: int = 7, pictures: int = 32, crop: int = 513, seed: int = 0) -> list[Row]:
    """Return ours, and ours with the decoded cache, against both forms of the references; one thread, milliseconds a picture.

    `root` holds PASCAL VOC in its own layout, whose val split is read; without it, pictures of VOC's size are drawn. Raises
    DataError where the data cannot be read.
    """
    with ExitStack() as stack:
        if root is None:
            root = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            write_photos(root, train=1, val=pictures, seed=seed)
        stack.enter_context(_one_thread())
        work = _Pipeline(open_data("voc", root, "val"), pictures, crop, seed)
        count = len(work.indices)
        sides: dict[str, Callable[[], Iterator[Made]]] = {
            OURS: lambda: work.ours(work.data),
            OURS_CACHED: lambda: work.ours(work.cached),
            PIL_PEER: work.pillow,
            TENSOR_PEER: work.tensors,
        }
        calls = {name: (lambda make=make: _exhaust(make())) for name, make in sides.items()}
        times = in_turns(calls, pairs, name=TASK)
        ms = {name: [one / count for one in values] for name, values in times.items()}
        shares = _stages(work)
        rows = []
        for side in (OURS, OURS_CACHED):
            for peer in (PIL_PEER, TENSOR_PEER):
                grey, alike = _difference(sides[side](), sides[peer]())
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
                        name="JPEG + mask -> normalised crop",
                        task=TASK,
                        side=side,
                        peer=peer,
                        threads=1,
                        size=(crop, crop),
                        agreement=alike,
                        figures=figures,
                        note=f"{count} pictures, scaled by 0.5-2, the same draws on every side",
                    )
                )
        return rows


def _difference(ours: Iterable[Made], theirs: Iterable[Made]) -> tuple[float, float]:
    """Return the largest difference of two sides' images, in grey levels, and the share of labels that are alike."""
    largest, alike, pixels = 0.0, 0, 0
    grey_C11 = 255 * torch.tensor(_NORMAL.std).view(3, 1, 1)
    for (image, labels), (their_image, their_labels) in zip(ours, theirs, strict=True):
        largest = max(largest, float(((image - their_image).abs() * grey_C11).max()))
        alike += int((labels == their_labels).sum())
        pixels += labels.numel()
    return largest, alike / pixels


def _stages(work: _Pipeline) -> dict[str, float]:
    """Return how our time is shared out: reading the files, making the crop, normalising."""
    started = time.perf_counter()
    samples = [work.data[index] for index in work.indices]
    read = time.perf_counter() - started
    started = time.perf_counter()
    _exhaust(work.ours(work.cached))
    rest = time.perf_counter() - started
    batch = torch.zeros(min(_BATCH, len(samples)), 3, work.crop, work.crop, dtype=torch.uint8)
    batch = batch.contiguous(memory_format=torch.channels_last)
    normalised(batch, _NORMAL)
    started = time.perf_counter()
    normalised(batch, _NORMAL)
    normalise = (time.perf_counter() - started) * len(samples) / len(batch)
    whole = read + rest
    return {
        "read_share": read / whole,
        "crop_share": (rest - normalise) / whole,
        "normalise_share": normalise / whole,
    }


def _exhaust(made: Iterable[Made]) -> None:
    for _ in made:
        pass


@contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
