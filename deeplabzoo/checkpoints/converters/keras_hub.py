"""keras-hub: its DeepLabV3+ on ResNet-50, as the `task.weights.h5` of a preset or as `save_weights` writes it.

The encoder runs at output stride 32 without dilation, ASPP is plain with rates 6, 12, 18 all the same, and the decoder is one
1x1 convolution; the classifier has no bias. Layers have no names in the file but numbers in the order of Keras' graph, in which
the shortcut of a block comes before its last convolution.
"""

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deeplabzoo.checkpoints.converters.key_mapping import converted_checkpoint
from deeplabzoo.checkpoints.types import Checkpoint
from deeplabzoo.errors import WeightsError
from deeplabzoo.models.config import DeepLabConfig, Preprocessing

# Arrays by name out of an HDF5 file that may be hostile, with h5py, which is imported on use.


_MAGIC = b"\x89HDF\r\n\x1a\n"
_MAX_ARRAYS = 10_000


def is_hdf5(path: Path) -> bool:
    """Whether a file begins as HDF5 does; False for files that cannot be read."""
    try:
        with path.open("rb") as file:
            return file.read(len(_MAGIC)) == _MAGIC
    except OSError:
        return False


def read_arrays(path: Path) -> dict[str, Tensor]:
    """Return the arrays of floating-point numbers by their paths in the file, in float32.

    Links, which may lead to other files, are not followed; arrays must lie in the file as large as they are, so that none grows
    out of a few compressed bytes. Raises WeightsError in one sentence, also where h5py is not installed.
    """
    try:
        h5py: Any = importlib.import_module("h5py")
    except ImportError:
        raise WeightsError(f"'{path}' is an HDF5 file, which takes h5py: pip install \"deeplabzoo[keras]\".") from None
    try:
        with h5py.File(path, "r") as file:
            names: list[str] = []
            file.visititems(lambda name, found: _note(names, name, is_array=isinstance(found, h5py.Dataset)))
            if len(names) > _MAX_ARRAYS:
                raise WeightsError(f"'{path}' holds more than {_MAX_ARRAYS} arrays, too many for a DeepLab.")
            arrays = {name: file[name] for name in names if file[name].dtype.kind == "f"}
            for name, array in arrays.items():
                if array.external or array.is_virtual or array.id.get_storage_size() < array.nbytes:
                    raise WeightsError(
                        f"Array '{name}' of the HDF5 file is compressed, incomplete or kept elsewhere; save it plainly."
                    )
            if sum(array.nbytes for array in arrays.values()) > path.stat().st_size:
                raise WeightsError(f"'{path}' claims more bytes of arrays than it has; some share theirs, so it is not read.")
            return {name: _tensor(array, name) for name, array in arrays.items()}
    except WeightsError:
        raise
    except Exception as error:  # a damaged file can fail in any way its bytes lead the library to
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise WeightsError(f"'{path}' is not a whole HDF5 file ({reason}); download or save it again.") from None


def _note(names: list[str], name: str, *, is_array: bool) -> bool | None:
    """Add an array's name; anything but None ends the visit."""
    if is_array:
        names.append(name)
    return True if len(names) > _MAX_ARRAYS else None


def _tensor(array: Any, name: str) -> Tensor:
    values = torch.from_numpy(np.asarray(array, np.float32))
    if not torch.isfinite(values).all():
        raise WeightsError(f"Array '{name}' of the HDF5 file holds values that are not finite; it cannot be used.")
    return values


FORMAT_NAME = "keras_hub"

_TASK, _ENCODER, _ASPP = "layers/deep_lab_v3_backbone/", "layers/functional/layers/", "layers/spatial_pyramid_pooling/"
_BLOCKS = (3, 4, 6, 3)
"""Blocks per stage of ResNet-50 (1512.03385, table 1)."""
_NORM = ("weight", "bias", "running_mean", "running_var")
_PIXELS = Preprocessing(
    size=(512, 512), resize="shortest", only_shrink=False, mean=(0.0, 0.0, 0.0), std=(1 / 255, 1 / 255, 1 / 255)
)

KeyPaths = dict[str, tuple[str, int]]
"""Our convolution or batch norm -> the folder of its layer in the file, and its number among the layers of its kind there."""


def can_convert(path: Path) -> bool:
    """Whether a file is HDF5; False for files that cannot be read."""
    return is_hdf5(path)


def convert(path: Path) -> Checkpoint:
    """Return the model under our names; raises WeightsError for other models of Keras, and if h5py is not installed."""
    arrays = read_arrays(path)
    found = {name.removeprefix(_TASK): tensor for name, tensor in arrays.items() if name.startswith(_TASK)}
    if not found and any(name.startswith(_ASPP) for name in arrays):
        raise WeightsError(
            f"'{path}' holds the model without its classifier (a model.weights.h5); the preset's task.weights.h5 has both."
        )
    classifier = arrays.get("layers/conv2d/vars/0")
    if any("aspp0" in name.split("/") or "concat_projection" in name.split("/") for name in arrays):
        raise WeightsError(
            f"'{path}' is bonlime's Keras DeepLab, which is not read; its weights come from TensorFlow's DeepLab zoo, whose "
            "frozen_inference_graph.pb is read."
        )
    if classifier is None or classifier.ndim != 4 or not any(name.startswith(_ASPP) for name in found):
        raise WeightsError(f"'{path}' is an HDF5 file, but holds no DeepLabV3+ of keras-hub; no other layout of Keras is read.")
    state = _state(found, path)
    outputs = classifier.shape[-1]
    state["head.classifier.weight"] = _kernel(classifier)
    state["head.classifier.bias"] = torch.zeros(outputs)
    return converted_checkpoint(
        FORMAT_NAME,
        config=DeepLabConfig(
            architecture="deeplabv3plus",
            encoder="resnet50",
            num_classes=max(2, outputs),
            output_stride=32,
            atrous_rates=(6, 12, 18),
            norm_eps=1e-3,
            dropout=0.0,
            aspp_separable=False,
            decoder_convs=1,
            decoder_kernel=1,
            decoder_separable=False,
        ),
        state_dict=state,
        preprocessing=_PIXELS,
        dropped=("the optimizer's state",) if any(name.startswith("optimizer/") for name in arrays) else (),
        notes=("rates 6, 12, 18 at output stride 32 and pixels 0 to 255 assumed, as in Keras' guide",),
    )


def _key_paths() -> KeyPaths:
    """Return where the file has each convolution; its batch norm has the same number."""
    found: KeyPaths = {"encoder.conv1": (_ENCODER, 0)}
    number = 1
    for stage, blocks in enumerate(_BLOCKS, start=1):
        for block in range(blocks):
            parts = ["conv1", "conv2", *(["downsample.0"] if block == 0 else []), "conv3"]
            for part in parts:
                found[f"encoder.layer{stage}.{block}.{part}"] = (_ENCODER, number)
                number += 1
    for index in range(5):
        branch = f"{_ASPP}aspp_parallel_channels/sequential{f'_{index}' if index else ''}/layers/"
        found["head.aspp.pool.conv" if index == 4 else f"head.aspp.branches.{index}.conv"] = (branch, 0)
    found["head.aspp.project.conv"] = (f"{_ASPP}projection/layers/", 0)
    return found | {"head.low_level.conv": ("layers/", 0), "head.decoder.0.conv": ("layers/", 1)}


def _norm_of(convolution: str) -> str:
    """Return our name of the batch norm after a convolution."""
    if convolution.endswith("downsample.0"):
        return f"{convolution[:-1]}1"
    if convolution.startswith("encoder."):
        before, _, last = convolution.rpartition(".")
        return f"{before}.{last.replace('conv', 'bn')}"
    return f"{convolution.removesuffix('conv')}norm"


def _state(found: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    used: set[str] = set()

    def take(name: str, rank: int) -> Tensor:
        tensor = found.get(name)
        if tensor is None or tensor.ndim != rank:
            raise WeightsError(f"'{path}' has no '{name}' of {rank} dimensions; only keras-hub's ResNet-50 models are read.")
        used.add(name)
        return tensor

    for ours, (folder, number) in _key_paths().items():
        suffix = f"_{number}" if number else ""
        state[f"{ours}.weight"] = _kernel(take(f"{folder}conv2d{suffix}/vars/0", 4))
        for index, kind in enumerate(_NORM):
            state[f"{_norm_of(ours)}.{kind}"] = take(f"{folder}batch_normalization{suffix}/vars/{index}", 1)
        state[f"{_norm_of(ours)}.num_batches_tracked"] = torch.tensor(0)
    left = sorted(set(found) - used)
    if left:
        raise WeightsError(f"'{path}' holds '{left[0]}', which keras-hub's DeepLabV3+ on ResNet-50 has not.")
    return state


def _kernel(values: Tensor) -> Tensor:
    """Return a kernel height x width x in x out as out x in x height x width."""
    return values.permute(3, 2, 0, 1).contiguous()
