"""The decoder runs in strips of rows with equal results, and encoders keep only the features that the head reads."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_fused_model import HEADS, network
from torch.utils._python_dispatch import TorchDispatchMode

from deeplabzoo.models.interpolation import upsample_rows
from deeplabzoo.optimization import fused_model
from deeplabzoo.optimization.fused_model import FusedV3PlusHead, build_fused_model
from deeplabzoo.optimization.onednn import prepack

IN_STRIPS = {name: 2 for name, options in HEADS.items() if options["architecture"] == "deeplabv3plus"} | {
    "v3plus_no_decoder": None,
    "v3plus_no_decoder_low_first": None,
    "v3plus_one_conv": 1,
    "v3plus_group": None,
}
"""Head -> halo rows of its decoder; None without decoder convolutions, or where group norm depends on the whole map."""


class SyntheticShapes(TorchDispatchMode):
    """Records the shape of every tensor that is created."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.seen.add(tuple(result.shape))
        return result


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("head", IN_STRIPS)
def test_strips_equal_the_whole_map(head: str, packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """At a height that is not a multiple of the strip, strips and whole map differ only by rounding, for every decoder."""
    image = torch.randn(2, 3, 150, 98)
    with torch.inference_mode():
        form = build_fused_model(network(**HEADS[head]))
        if packed:
            prepack(form)
        assert isinstance(form.head, FusedV3PlusHead)
        assert form.head.halo == IN_STRIPS[head]
        whole = form(image)
        monkeypatch.setattr(fused_model, "STRIP_BYTES", 1)
        monkeypatch.setattr(fused_model, "_MIN_ROWS_PER_HALO", 5)
        with SyntheticShapes() as shapes:
            strips = form(image)
    whole_maps = {shape for shape in shapes.seen if shape[1:] == (32, *whole.shape[2:])}
    assert bool(whole_maps) == (HEADS[head].get("norm") == "group"), whole_maps
    assert strips.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(strips, whole, rtol=0, atol=2e-6 * float(whole.abs().max()))


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize(("source", "target"), [((5, 7), (38, 25)), ((1, 1), (4, 3)), ((33, 65), (129, 257))])
def test_upsampled_rows_equal_those_of_the_whole_map(
    source: tuple[int, int], target: tuple[int, int], align_corners: bool
) -> None:
    """Any rows of an upsampled map can be computed without the others, at every ratio."""
    x = torch.randn(2, 3, *source)
    whole = F.interpolate(x, size=target, mode="bilinear", align_corners=align_corners)
    for rows in (slice(0, 1), slice(1, 3), slice(2, target[0])):
        part = upsample_rows(x, target, rows, align_corners=align_corners)
        torch.testing.assert_close(part, whole[:, :, rows], rtol=0, atol=4e-6)


@pytest.mark.parametrize(("encoder", "architecture", "kept"), [
    ("resnet18", "deeplabv3plus", 2), ("mobilenetv2_050", "deeplabv3plus", 2), ("mobilenetv3", "deeplabv3", 1),
])  # fmt: skip
def test_an_encoder_keeps_no_feature_that_the_head_does_not_read(encoder: str, architecture: str, kept: int) -> None:
    """The features of the stem alone are larger than all that the head reads."""
    form = build_fused_model(network(encoder=encoder, architecture=architecture))
    with torch.inference_mode():
        assert len(form.encoder(torch.randn(1, 3, 65, 97))) == kept
