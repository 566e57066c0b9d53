"""Files that keras-hub itself wrote, and its own logits, where it is installed (the tests do without).

keras-hub 0.32 with Keras on PyTorch, in an environment of its own: `pip install keras-hub h5py torch`, and this package.
"""

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.parity import random_images, require_same_logits

import deeplabzoo
from deeplabzoo.checkpoints.converters import (
    keras_hub as origin,  # and with it all of PyTorch, which must be there before Keras is
)
from deeplabzoo.errors import WeightsError

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


def library(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("KERAS_BACKEND", "torch")
    hub = pytest.importorskip("keras_hub")
    importlib.import_module("keras").config.set_floatx("float64")  # 53 layers of random norms amplify float32's rounding
    return hub


def segmenter(hub: Any, num_classes: int) -> Any:
    """The network of its one preset, as its guide builds it, with norm statistics of a few pictures, disturbed."""
    encoder = hub.models.ResNetBackbone(
        input_conv_filters=[64],
        input_conv_kernel_sizes=[7],
        stackwise_num_filters=[64, 128, 256, 512],
        stackwise_num_blocks=[3, 4, 6, 3],
        stackwise_num_strides=[1, 2, 2, 2],
        block_type="bottleneck_block",
    )
    backbone = hub.models.DeepLabV3Backbone(
        image_encoder=encoder,
        projection_filters=48,
        low_level_feature_key="P2",
        spatial_pyramid_pooling_key="P5",
        upsampling_size=8,
        dilation_rates=[6, 12, 18],
    )
    assert backbone.count_params() == 39190656  # as the preset's description says
    net = hub.models.DeepLabV3ImageSegmenter(backbone=backbone, num_classes=num_classes)
    generator = torch.Generator().manual_seed(0)
    norms = [one for one in net._flatten_layers() if type(one).__name__ == "BatchNormalization"]
    for norm in norms:
        norm.momentum = 0.0
        for values, low, high in ((norm.gamma, 0.7, 1.3), (norm.beta, -0.3, 0.3)):
            values.assign(torch.empty(values.shape).uniform_(low, high, generator=generator))
    with torch.no_grad():
        net(random_images(4, 128).double().permute(0, 2, 3, 1), training=True)
    for norm in norms:
        spread = torch.empty(norm.moving_variance.shape).uniform_(0.7, 1.4, generator=generator)
        norm.moving_variance.assign(norm.moving_variance.value.data * spread)
    for variable in net.variables:
        variable.assign(variable.value.data.float().to(variable.value.dtype))  # what our float32 holds too
    return net


def test_logits_are_keras_hubs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At sizes that it takes: multiples of its stride."""
    theirs = segmenter(library(monkeypatch), 21)
    theirs.save_weights(tmp_path / "task.weights.h5")
    assert origin.can_convert(tmp_path / "task.weights.h5")
    ours = deeplabzoo.load(tmp_path / "task.weights.h5").double()
    for size in ((128, 96), (160, 224)):
        image = random_images(1, size).double()
        with torch.inference_mode():
            found = ours(image)
        with torch.no_grad():
            expected = theirs(image.permute(0, 2, 3, 1), training=False).permute(0, 3, 1, 2)
        require_same_logits(found, expected)


def test_a_backbone_alone_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    segmenter(library(monkeypatch), 21).backbone.save_weights(tmp_path / "model.weights.h5")
    with pytest.raises(WeightsError, match="without its classifier"):
        deeplabzoo.load(tmp_path / "model.weights.h5")
