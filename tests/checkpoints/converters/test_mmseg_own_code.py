"""Every row of mmsegmentation against mmsegmentation's own code, where that can be imported (no part of the tests' own needs).

mmsegmentation 1.2.2 runs with mmengine and the pure-Python mmcv-lite 2.1.0, in an environment of its own:
`pip install --no-deps mmsegmentation==1.2.2 mmengine mmcv-lite==2.1.0`, and then addict, yapf, termcolor, rich, ftfy,
prettytable and opencv-python-headless. Its other networks need compiled operations, for which empty classes stand in here.
"""

import functools
import importlib
import sys
import types
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.mmseg_reference import Reference
from helpers.parity import random_images, randomised, require_same_logits
from torch import nn

from deeplabzoo.checkpoints.converters.mmseg import FORMAT_NAME, convert
from deeplabzoo.hub.manifest import WeightRow, released
from deeplabzoo.models.deeplab import DeepLab

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

ROWS = [row for row in released() if row.origin == FORMAT_NAME]
NETWORKS = {replace(row.config, num_classes=7): row for row in ROWS}
"""One row of each arithmetic: the number of classes is none of it."""


class Compiled(types.ModuleType):
    """Stands for `mmcv.ops`, whatever is taken from it."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


@functools.cache
def library() -> tuple[Path, Callable[[str], Any], Callable[[Any], nn.Module]]:
    """Return the folder of its configurations, what reads one, and what builds a network."""
    pytest.importorskip("mmcv")
    for name in ("mmcv.ops", "mmcv.ops.point_sample", "mmcv.ops.carafe"):
        sys.modules[name] = Compiled(name)
    models = importlib.import_module("mmseg.models")
    config = importlib.import_module("mmengine.config").Config
    folder = Path(str(importlib.import_module("mmseg").__file__)).parent / ".mim"
    return folder, config.fromfile, models.MODELS.build if hasattr(models, "MODELS") else models.build_segmentor


@functools.cache
def published() -> dict[str, str]:
    """Return the configuration of every published address, out of the metafiles."""
    folder = library()[0]
    load = importlib.import_module("yaml").safe_load
    entries = [one for file in (folder / "configs").glob("*/metafile.yaml") for one in load(file.read_text())["Models"]]
    return {one["Weights"]: one["Config"].replace("ddeeplab", "deeplab") for one in entries if "Weights" in one}


def original(row: WeightRow) -> Any:
    """Build the network of a row from the configuration that its metafile names, on one device and without downloads."""
    folder, read, build = library()
    url = str(row.source)
    name = published()[url]
    if "r101" in url and "_r50-" in name:
        name = name.replace("_r50-", "_r101-")  # Pascal Context with V3+: the metafile names the wrong configuration
    settings = read(str(folder / name)).model
    settings.pretrained = None
    settings.pop("data_preprocessor")
    _make_local(settings)
    torch.manual_seed(0)
    return build(settings)


def _make_local(settings: Any) -> None:
    """Turn norms that are synchronised over processes into plain ones."""
    if isinstance(settings, dict):
        if settings.get("type") == "SyncBN":
            settings["type"] = "BN"
        settings = list(settings.values())
    if isinstance(settings, list | tuple):
        for one in settings:
            _make_local(one)


class Whole(nn.Module):
    """Logits at the picture's size in eval mode; in training both heads, which makes the norms' statistics."""

    def __init__(self, net: Any) -> None:
        super().__init__()
        self.net = net

    def forward(self, image_BCHW: torch.Tensor) -> torch.Tensor:
        features = self.net.extract_feat(image_BCHW)
        if self.training:
            self.net.auxiliary_head(features)
        low: torch.Tensor = self.net.decode_head(features)
        aligned = self.net.decode_head.align_corners
        return nn.functional.interpolate(low, size=image_BCHW.shape[2:], mode="bilinear", align_corners=aligned)


@pytest.mark.parametrize("row", NETWORKS.values(), ids=lambda row: row.full_name)
def test_logits_are_mmsegmentations(row: WeightRow) -> None:
    """In the configuration of the row, at an even and an odd size, and the auxiliary head's where it is kept."""
    theirs = original(row)
    whole = randomised(Whole(theirs))
    ours = DeepLab.from_weights(row.config, convert(theirs.state_dict(), Path("random.pth")).state_dict)
    for height, width in ((64, 96), (97, 65)):
        image_BCHW = random_images(1, (height, width), seed=height)
        with torch.inference_mode():
            require_same_logits(ours(image_BCHW), whole(image_BCHW))
            if ours.aux_head is not None:
                low = ours.aux_head(ours.encoder(image_BCHW)[ours.feature_plan.auxiliary])
                require_same_logits(low, theirs.auxiliary_head(theirs.extract_feat(image_BCHW)))


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.full_name)
def test_the_reference_has_its_tensors(row: WeightRow) -> None:
    """What the fast tests load has exactly the names and shapes of the network that the row's configuration builds."""
    with torch.device("meta"):
        theirs, reference = original(row).state_dict(), Reference(row.config).state_dict()
    assert {name: tensor.shape for name, tensor in reference.items()} == {name: one.shape for name, one in theirs.items()}
