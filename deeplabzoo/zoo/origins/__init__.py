"""Foreign checkpoint formats, one module each: it recognises its files by their content and converts them into our terms.

There are two kinds. A whole file format (TensorFlow's graphs, TensorFlow Lite, HDF5) reads its files itself. A layout is a
way to name the tensors of a PyTorch or safetensors file, which is read safely once, whoever wrote it, and recognised by its
tensor names. A new one is a module with `ORIGIN`, `recognise` and `convert`, named in `FORMATS` or `LAYOUTS` below; no two may
recognise the same names.
"""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Protocol

from torch import Tensor

from deeplabzoo.zoo.origins import (
    detectron2,
    jfzhang95,
    keras_hub,
    ml_cvnets,
    mmseg,
    segmentron,
    smp,
    tf_graph,
    tflite,
    torchvision,
    transformers,
    vainf,
)
from deeplabzoo.zoo.origins.converted import Converted as Converted
from deeplabzoo.zoo.state_dict import read_state_dict


class Format(Protocol):
    """What the module of a whole file format offers."""

    ORIGIN: str
    """Its name, as in the manifest's `origin`."""

    def recognise(self, path: Path) -> bool:
        """Whether the file is of this format; never raises."""

    def convert(self, path: Path) -> Converted:
        """Read the file; raises WeightsError in one sentence."""


class Layout(Protocol):
    """What the module of a layout of named tensors offers."""

    ORIGIN: str
    """Its name, as in the manifest's `origin`."""

    def recognise(self, names: Collection[str]) -> bool:
        """Whether tensors of these names (without `module.`) are of this layout; never raises."""

    def convert(self, tensors: Mapping[str, Tensor], path: Path) -> Converted:
        """Return float32 tensors under our names; `path` is for what lies beside the file, such as a `config.json`.

        Raises WeightsError in one sentence. What the tensors do not tell (rates, padding, epsilon) is what the origin's code
        has by default; a row of the manifest knows it for its file.
        """


FORMATS: tuple[Format, ...] = (tflite, tf_graph, keras_hub)
LAYOUTS: tuple[Layout, ...] = (torchvision, smp, transformers, vainf, ml_cvnets, jfzhang95, mmseg, segmentron, detectron2)


def read(path: Path) -> Converted | dict[str, Tensor]:
    """Read a file that is not ours: converted where an origin recognises it, else its tensors by name as they are.

    Raises WeightsError in one sentence.
    """
    for one in FORMATS:
        if one.recognise(path):
            return one.convert(path)
    tensors = read_state_dict(path)
    layout = identify(tensors)
    return tensors if layout is None else layout.convert(tensors, path)


def identify(names: Collection[str]) -> Layout | None:
    """Return the layout that tensors of these names have, or None."""
    return next((layout for layout in LAYOUTS if layout.recognise(names)), None)
