"""Foreign checkpoint formats, one module each: it recognises its files by their content and converts them into our terms.

There are two kinds. A whole file format (TensorFlow's graphs, TensorFlow Lite, HDF5) reads its files itself. A layout is a
way to name the tensors of a PyTorch or safetensors file, which is read safely once, whoever wrote it, and recognised by its
tensor names. A new one is a module with `FORMAT_NAME`, `can_convert` and `convert`, named in `FILE_CONVERTERS` or `STATE_DICT_CONVERTERS` below; no two may
can_convert the same names.
"""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Protocol

from torch import Tensor

from deeplabzoo.checkpoints.converters import (
    detectron2,
    jfzhang95,
    keras_hub,
    ml_cvnets,
    mmseg,
    segmentron,
    smp,
    torchvision,
    transformers,
    vainf,
)
from deeplabzoo.checkpoints.converters.tensorflow import frozen_graph, tflite
from deeplabzoo.checkpoints.safe_pickle import read_state_dict
from deeplabzoo.checkpoints.types import Checkpoint as Checkpoint


class FileConverter(Protocol):
    """What the module of a whole file format offers."""

    FORMAT_NAME: str
    """Its name, as in the manifest's `origin`."""

    def can_convert(self, path: Path) -> bool:
        """Whether the file is of this format; never raises."""

    def convert(self, path: Path) -> Checkpoint:
        """Read the file; raises WeightsError in one sentence."""


class StateDictConverter(Protocol):
    """What the module of a layout of named tensors offers."""

    FORMAT_NAME: str
    """Its name, as in the manifest's `origin`."""

    def can_convert(self, names: Collection[str]) -> bool:
        """Whether tensors of these names (without `module.`) are of this layout; never raises."""

    def convert(self, tensors: Mapping[str, Tensor], path: Path) -> Checkpoint:
        """Return float32 tensors under our names; `path` is for what lies beside the file, such as a `config.json`.

        Raises WeightsError in one sentence. What the tensors do not tell (rates, padding, epsilon) is what the origin's code
        has by default; a row of the manifest knows it for its file.
        """


FILE_CONVERTERS: tuple[FileConverter, ...] = (tflite, frozen_graph, keras_hub)
STATE_DICT_CONVERTERS: tuple[StateDictConverter, ...] = (
    torchvision,
    smp,
    transformers,
    vainf,
    ml_cvnets,
    jfzhang95,
    mmseg,
    segmentron,
    detectron2,
)


def read_foreign(path: Path) -> Checkpoint | dict[str, Tensor]:
    """Read a file that is not ours: converted where an origin recognises it, else its tensors by name as they are.

    Raises WeightsError in one sentence.
    """
    for one in FILE_CONVERTERS:
        if one.can_convert(path):
            return one.convert(path)
    tensors = read_state_dict(path)
    converter = find_converter(tensors)
    return tensors if converter is None else converter.convert(tensors, path)


def find_converter(names: Collection[str]) -> StateDictConverter | None:
    """Return the layout that tensors of these names have, or None."""
    return next((converter for converter in STATE_DICT_CONVERTERS if converter.can_convert(names)), None)
