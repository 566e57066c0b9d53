"""Files in the layout of keras-hub's DeepLabV3+, against an independent list of its layers.

Its own code is used in `test_keras_hub_own_code.py`.
"""

import shutil
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import deeplabzoo
from deeplabzoo.checkpoints.converters import keras_hub
from deeplabzoo.errors import WeightsError

h5py = pytest.importorskip("h5py", reason="the extra `keras` is not installed")

BACKBONE = "layers/deep_lab_v3_backbone/layers"
POOLING = f"{BACKBONE}/spatial_pyramid_pooling"


def kernels(num_classes: int) -> dict[str, tuple[int, ...]]:
    """Kernel shapes by the place that keras-hub saves them at, as its own `save_weights` was seen to write them."""
    found: dict[str, tuple[int, ...]] = {}
    sizes: list[tuple[int, ...]] = [(7, 7, 3, 64)]
    inputs = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            sizes += [(1, 1, inputs, width), (3, 3, width, width)]
            sizes += [(1, 1, inputs, 4 * width)] if block == 0 else []
            sizes += [(1, 1, width, 4 * width)]
            inputs = 4 * width
    for number, size in enumerate(sizes):
        found[f"{BACKBONE}/functional/layers/conv2d{f'_{number}' if number else ''}"] = size
    for index, kernel in enumerate((1, 3, 3, 3, 1)):
        branch = f"sequential{f'_{index}' if index else ''}/layers/conv2d"
        found[f"{POOLING}/aspp_parallel_channels/{branch}"] = (kernel, kernel, 2048, 256)
    found[f"{POOLING}/projection/layers/conv2d"] = (1, 1, 1280, 256)
    found |= {f"{BACKBONE}/conv2d": (1, 1, 256, 48), f"{BACKBONE}/conv2d_1": (1, 1, 304, 256)}
    return found | {"layers/conv2d": (1, 1, 256, num_classes)}


def write(path: Path, num_classes: int) -> Path:
    """A file with random values and as many norms as there are convolutions but for the classifier."""
    random = np.random.default_rng(0)
    with h5py.File(path, "w") as file:
        for place, size in kernels(num_classes).items():
            file[f"{place}/vars/0"] = np.full(size, random.normal(), np.float32)
            norm = place.replace("conv2d", "batch_normalization")
            for index in range(4 if place.startswith(BACKBONE) else 0):
                file[f"{norm}/vars/{index}"] = random.uniform(0.5, 1.5, size[3]).astype(np.float32)
        file["optimizer/vars/0"] = np.float32(1)
    return path


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("keras") / "task.weights.h5", 2)


def test_a_file_becomes_a_model(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Every tensor of its own layout, and none left over."""
    net = deeplabzoo.load(file)
    assert "keras_hub layout" in caplog.messages[-1]
    assert "optimizer" in caplog.messages[-1]
    assert net(torch.rand(1, 3, 65, 97)).shape == (1, 2, 65, 97)
    net.set_output_stride(16)
    assert net.config.atrous_rates == (12, 24, 36)


@pytest.mark.parametrize(
    ("place", "values", "sentence"),
    [
        ("layers/conv2d/vars/0", None, "holds no DeepLabV3. of keras-hub"),
        (f"{BACKBONE}/conv2d/vars/0", None, "has no 'layers/conv2d/vars/0'"),
        (
            f"{BACKBONE}/conv2d_2/vars/0",
            np.zeros((1, 1, 2, 2), np.float32),
            "which keras-hub's DeepLabV3. on ResNet-50 has not",
        ),
        (f"{BACKBONE}/conv2d/vars/0", np.full((1, 1, 256, 48), np.nan, np.float32), "not finite"),
    ],
)
def test_other_files_are_refused_in_a_sentence(place: str, values: Any, sentence: str, file: Path, tmp_path: Path) -> None:
    path = Path(shutil.copy(file, tmp_path / "other.h5"))
    with h5py.File(path, "r+") as opened:
        if place in opened:
            del opened[place]
        if values is not None:
            opened[place] = values
    with pytest.raises(WeightsError, match=sentence):
        keras_hub.convert(path)


def test_arrays_that_are_not_in_the_file_are_refused(tmp_path: Path) -> None:
    """A few bytes must not grow into gigabytes, nor lead to another file."""
    path = tmp_path / "large.h5"
    with h5py.File(path, "w") as file:
        file.create_dataset("layers/conv2d/vars/0", (1 << 20, 1 << 14), "f4")
    with pytest.raises(WeightsError, match="compressed, incomplete or kept elsewhere"):
        deeplabzoo.load(path)
    with h5py.File(path, "w") as file:
        file["layers/conv2d/vars/0"] = h5py.ExternalLink("other.h5", "secret")
    with pytest.raises(WeightsError, match="holds no DeepLabV3"):
        deeplabzoo.load(path)


def test_bonlimes_files_are_named_with_the_way_out(tmp_path: Path) -> None:
    path = tmp_path / "deeplabv3_mobilenetv2_tf_dim_ordering_tf_kernels.h5"
    with h5py.File(path, "w") as file:
        file["aspp0/aspp0/kernel:0"] = np.zeros((1, 1, 320, 256), np.float32)
    with pytest.raises(WeightsError, match=r"bonlime.*frozen_inference_graph\.pb"):
        deeplabzoo.load(path)


def test_arrays_that_share_their_bytes_are_refused(tmp_path: Path) -> None:
    """Thousands of arrays at one address would grow a small file into gigabytes."""
    path = tmp_path / "task.weights.h5"
    with h5py.File(path, "w") as file:
        arrays = [file.create_dataset(f"layers/conv2d_{index}/vars/0", (1 << 16,), "f4") for index in range(8)]
        for array in arrays:
            array[:] = 1.0
        first, *others = [array.id.get_offset() for array in arrays]
    data = path.read_bytes()
    for offset in others:
        assert data.count(struct.pack("<Q", offset)) == 1
        data = data.replace(struct.pack("<Q", offset), struct.pack("<Q", first))
    end = max(others)  # the last array's own bytes are no longer needed; the superblock states where the file ends
    path.write_bytes(data[:end].replace(struct.pack("<Q", len(data)), struct.pack("<Q", end), 1))
    with pytest.raises(WeightsError, match="claims more bytes of arrays than it has"):
        deeplabzoo.load(path)


def test_a_damaged_file_is_refused_in_a_sentence(file: Path, tmp_path: Path) -> None:
    path = tmp_path / "task.weights.h5"
    data = file.read_bytes()
    for end in (8, 100, 5000, len(data) // 2):
        path.write_bytes(data[:end])
        with pytest.raises(WeightsError, match="not a whole HDF5 file"):
            deeplabzoo.load(path)


def test_without_h5py_the_extra_is_named(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(WeightsError, match=r"deeplabzoo\[keras\]"):
        deeplabzoo.load(file)
