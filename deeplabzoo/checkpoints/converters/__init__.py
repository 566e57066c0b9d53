"""Converters of foreign checkpoints, one module per library: each recognises its files by content and returns our names.

There are two kinds. A file converter reads a whole file format (TensorFlow's graphs, TensorFlow Lite, HDF5). A state dict
converter renames the tensors of a PyTorch or safetensors file, which `tensor_file` opens once without running code, and
recognises it by tensor names. A new one is a module with `FORMAT_NAME`, `can_convert` and `convert`, listed below in
`FILE_CONVERTERS` or `STATE_DICT_CONVERTERS`; no two may recognise the same names.
"""

from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from torch import Tensor

from deeplabzoo.checkpoints.converters import (
    detectron2,
    efficientnet_pytorch,
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
from deeplabzoo.checkpoints.converters.key_mapping import with_classes
from deeplabzoo.checkpoints.converters.tensorflow import frozen_graph, tflite
from deeplabzoo.checkpoints.state_dict import find_classes, find_model, unwrap
from deeplabzoo.checkpoints.tensor_file import Contents, has_safetensors_structure, open_contents
from deeplabzoo.checkpoints.types import BARE, Checkpoint
from deeplabzoo.errors import WeightsError


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

        Raises WeightsError in one sentence. What the tensors do not state (rates, padding, epsilon) is what the origin's code
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
    efficientnet_pytorch,
)


_UNSUPPORTED: tuple[tuple[frozenset[str], str], ...] = (
    (
        frozenset({"cls_conv.weight", "shortcut_conv.0.weight", "aspp.branch5_conv.weight"}),
        "bubbliiiing's DeepLabV3+ (deeplabv3-plus-pytorch)",
    ),
    (frozenset({"decoder.output.8.weight", "ASSP.conv1.weight"}), "yassouali's DeepLabV3+ (pytorch-segmentation)"),
    (frozenset({"ASSP.aspp1.0.weight", "ASSP.conv1.weight"}), "yassouali's DeepLabV3+ (pytorch-segmentation)"),
    (frozenset({"head.aspp.b0.0.weight"}), "Tramac's DeepLab (awesome-semantic-segmentation-pytorch)"),
    (frozenset({"aspp.b0.0.weight"}), "Tramac's DeepLab (awesome-semantic-segmentation-pytorch)"),
    (frozenset({"head.aspp.b4.gap.1.weight"}), "Tramac's DeepLab (awesome-semantic-segmentation-pytorch)"),
    (frozenset({"layer5.block1.reduce.conv.weight"}), "kazuto1011's DeepLab (deeplab-pytorch)"),
    (frozenset({"layer1.conv1.conv.weight", "aspp.c0.weight"}), "kazuto1011's DeepLab (deeplab-pytorch)"),
)
"""Tensor names -> a layout in common use that no converter reads."""


def read_foreign(path: Path) -> Checkpoint:
    """Read a file that is not a deeplabzoo checkpoint: converted where its layout is known, else its tensors by name.

    Args:
        path: A weights file; a `config.json` beside it is read where its layout has one.

    Returns:
        The checkpoint under our names; of a layout that no converter knows (an encoder's, for example), a bare state dict.

    Raises:
        WeightsError: In one sentence, for files that are damaged, hostile, or of a layout that is known not to be readable.
    """
    if not has_safetensors_structure(path):
        for one in FILE_CONVERTERS:
            if one.can_convert(path):
                return one.convert(path)
        _refuse_tensorflow_checkpoint(path)
    with open_contents(path) as contents:
        return convert_contents(contents)


def convert_contents(contents: Contents) -> Checkpoint:
    """Return the model among a file's tensors under our names.

    Wrappers and prefixes around it (`state_dict`, `module.`, `model.`, `_orig_mod.`, EMA, student and teacher …) are looked
    through; what was taken, dropped or left out is in the notes.
    """
    path = contents.path
    try:
        model = find_model(contents.tensors, _is_known)
    except WeightsError as error:
        raise WeightsError(f"'{path}': {error}") from None
    if model is None:
        inside = unwrap(contents.tensors)
        _refuse_unsupported(inside.values(), path)
        notes = (*_outside(len(contents.tensors) - len(inside)), *_left_out(contents))
        return Checkpoint(format_name=BARE, config=None, encoder=None, state_dict=contents.load(inside), notes=notes)
    tensors = contents.load(model.names)
    notes = (*model.notes, *_outside(model.outside), *_left_out(contents))
    converter, classes = find_converter(tensors), find_classes(contents.value)
    if converter is None:
        names, palette = classes if classes and len(classes[0]) == len(tensors["head.classifier.weight"]) else (None, None)
        return Checkpoint(
            format_name=BARE, config=None, encoder=None, state_dict=tensors, classes=names, palette=palette, notes=notes
        )
    converted = converter.convert(tensors, path)
    if classes is not None:
        converted = with_classes(converted, *classes)
    return replace(converted, notes=(*converted.notes, *notes))


def find_converter(names: Collection[str]) -> StateDictConverter | None:
    """Return the converter whose layout tensors of these names have, or None."""
    return next((converter for converter in STATE_DICT_CONVERTERS if converter.can_convert(names)), None)


def _is_known(names: Collection[str]) -> bool:
    """Whether names are those of a whole model in a known layout, ours included."""
    is_ours = "head.classifier.weight" in names and any(name.startswith("encoder.") for name in names)
    return is_ours or find_converter(names) is not None


def _outside(count: int) -> tuple[str, ...]:
    return (f"{count} tensors beside the model dropped",) if count else ()


def _left_out(contents: Contents) -> tuple[str, ...]:
    """Return a phrase on the objects that a training script kept in its file, none of which was made."""
    some = [f"{name} ({label})" for name, label in contents.objects.items() if "." not in name]
    if not some:
        return ()
    return (f"objects left out: {', '.join(some[:3])}{f' and {len(some) - 3} more' if len(some) > 3 else ''}",)


def _refuse_unsupported(names: Collection[str], path: Path) -> None:
    """Raise WeightsError for a layout in common use that no converter reads, behind any prefix."""
    for markers, layout in _UNSUPPORTED:
        if all(any(f".{name}".endswith(f".{marker}") for name in names) for marker in markers):
            raise WeightsError(
                f"'{path}' is {layout}, whose layout no converter reads; docs/origins.md lists those that are read. "
                "Give weights of one of them, or train a model of deeplabzoo on the same data."
            )


_TABLE_MAGIC = b"\x57\xfb\x80\x8b\x24\x75\x47\xdb"
"""Last bytes of the index of a TensorFlow checkpoint, a LevelDB table."""


def _refuse_tensorflow_checkpoint(path: Path) -> None:
    """Raise WeightsError for a file of a TensorFlow training checkpoint (`model.ckpt.index`, `.data-…`), or its prefix."""
    is_part = path.is_file() and path.with_suffix(".index").is_file() and path.name.partition(".ckpt")[1] == ".ckpt"
    is_prefix = not path.exists() and path.with_name(f"{path.name}.index").is_file()
    is_index = False
    if path.is_file() and path.stat().st_size >= len(_TABLE_MAGIC):
        with path.open("rb") as file:
            file.seek(-len(_TABLE_MAGIC), 2)
            is_index = file.read() == _TABLE_MAGIC
    if is_part or is_prefix or is_index:
        raise WeightsError(
            f"'{path}' is a TensorFlow training checkpoint, which does not say which model it is of; export it with "
            "TensorFlow's deeplab/export_model.py and give the frozen_inference_graph.pb."
        )
