"""The same network for inference alone: norms folded, channels_last throughout, heads that concatenate nothing.

Exact up to rounding: every step is an identity of real numbers, done once in float64, and what it changes in float32 is as
much as plain float32 is from the truth anyway (tests/test_inference_form.py). Norms that depend on the image (group and
layer norm) cannot be folded and stay; group norm runs on contiguous memory, where torch's kernel is more exact.
"""

from collections.abc import Sequence

import torch
from timm.models._features import FeatureListNet
from timm.models.efficientnet import EfficientNetFeatures
from timm.models.mobilenetv3 import MobileNetV3Features
from torch import nn

from deeplabzoo.models.deeplab import DeepLab
from deeplabzoo.models.fast_decoder import FastV3PlusHead
from deeplabzoo.models.fast_head import FastV3Head
from deeplabzoo.models.folding import fold_norms, fold_plain_convolutions, shared_copy
from deeplabzoo.models.fused_residual import fuse_residuals
from deeplabzoo.models.heads import V3Head

_OBSERVED_HW = (65, 97)
"""Size of the image that the encoder is watched with: odd sides that differ, and cells enough at stride 32."""


class InferenceForm(nn.Module):
    """A network's encoder and head as `inference_form` rebuilt them; holds no reference to the network itself."""

    def __init__(self, encoder: nn.Module, head: FastV3Head | FastV3PlusHead, places: Sequence[int]) -> None:
        """`places` are those of the head's inputs among the encoder's features."""
        super().__init__()
        self.encoder, self.head, self.places = encoder, head, tuple(places)

    def forward(self, image_BCHW: torch.Tensor) -> torch.Tensor:
        """Map a normalised image to logits at the head's own size, in channels_last memory."""
        features = self.encoder(image_BCHW.contiguous(memory_format=torch.channels_last))
        read = [features[place] for place in self.places]
        del features
        logits: torch.Tensor = self.head(read)
        return logits.contiguous(memory_format=torch.channels_last)


def inference_form(net: DeepLab) -> InferenceForm:
    """Return the inference form of a network as it is now; the network stays as it is, and shares what tensors it can.

    Call it under `torch.inference_mode()` or `torch.no_grad()`: it has no gradients to give. What could not be folded is said
    in one line. Takes one forward pass over a small image.
    """
    encoder = shared_copy(net.encoder)
    parameter = next(net.parameters())
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(1, net.config.in_chans, *_OBSERVED_HW, generator=generator).to(parameter)
    plan = net.feature_plan
    places: tuple[int, ...] = (plan.last,) if isinstance(net.head, V3Head) else (plan.last, plan.low_level)
    with torch.no_grad():
        places = _yield_only(encoder, places)
        fold_norms(encoder, image)
        fold_plain_convolutions(encoder)
        fuse_residuals(encoder)
        head = FastV3Head(net.head) if isinstance(net.head, V3Head) else FastV3PlusHead(net.head)
    form = InferenceForm(encoder, head, places).requires_grad_(False).eval()
    for module in form.modules():
        if isinstance(module, nn.GroupNorm):
            module.register_forward_pre_hook(_contiguous)
    return form


def _yield_only(encoder: nn.Module, places: tuple[int, ...]) -> tuple[int, ...]:
    """Let the encoder keep no other features than those at `places`, and return where they are then.

    Others would stay in memory until its end. An encoder whose collecting is not known here yields all of them, as before.
    """
    if type(encoder) is FeatureListNet:
        encoder.return_layers = {
            name: mark for place, (name, mark) in enumerate(encoder.return_layers.items()) if place in places
        }
    elif (type(encoder) is EfficientNetFeatures or type(encoder) is MobileNetV3Features) and encoder.feature_hooks is None:
        encoder._stage_out_idx = {stage: place for stage, place in encoder._stage_out_idx.items() if place in places}
    else:
        return places
    return tuple(sorted(places).index(place) for place in places)


def _contiguous(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """Torch's group norm over channels_last memory rounds two to three times as much as over contiguous memory."""
    return tuple(one.contiguous() for one in inputs)
