"""What the oldest supported libraries do otherwise than the newest, brought about with whatever is installed."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn

from deeplabzoo.data.image_io import read_mask
from deeplabzoo.errors import UsageError
from deeplabzoo.models.config import DeepLabConfig
from deeplabzoo.models.deeplab import DeepLab
from deeplabzoo.models.encoders import build_feature_extractor


def test_an_encoder_that_reads_numbers_while_it_is_built_needs_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """timm 1.0.15 reads drop path rates off a tensor, which failed on the meta device, through which every file is loaded."""
    create_model = timm.create_model
    rates: list[float] = []

    def as_timm_1_0_15(*names: str, **options: object) -> nn.Module:
        rates.extend(rate for stage in torch.linspace(0, 0.3, 4).split([1, 3]) for rate in stage.tolist())
        return create_model(*names, **options)

    monkeypatch.setattr("timm.create_model", as_timm_1_0_15)
    with torch.device("meta"):
        encoder = build_feature_extractor("mobilevit_xxs", 16)
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3])
    assert {parameter.device.type for parameter in encoder.parameters()} == {"meta"}


def test_an_encoder_that_the_installed_timm_has_not_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    """The table is of the newest timm; an older one has no cspnext, and said so in a traceback."""
    monkeypatch.setattr("timm.is_model", lambda name: name != "cspnext_tiny")
    with pytest.raises(UsageError, match=rf"timm {timm.__version__}, which is installed, has no encoder 'cspnext_tiny'"):
        DeepLab(DeepLabConfig(architecture="deeplabv3", encoder="cspnext_tiny"))


def test_masks_are_read_where_pillow_describes_their_pixels_by_bare_tuples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pillow 10 has no names for the parts of a tile, so no grey or palette mask could be read with the lower bound."""
    labels = np.arange(4, dtype=np.uint8).reshape(2, 2)
    Image.fromarray(labels).save(tmp_path / "mask.png")
    opened = Image.open

    def as_pillow_10(*words: Any, **options: Any) -> Image.Image:
        image = opened(*words, **options)
        image.tile = [tuple(tile) for tile in image.tile]  # type: ignore[misc]
        return image

    monkeypatch.setattr("PIL.Image.open", as_pillow_10)
    np.testing.assert_array_equal(read_mask(tmp_path / "mask.png"), labels)
