"""The same weights inside another library's own network, full-size logits out, as its users would call it."""

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from deeplabzoo.errors import UnknownNameError, UsageError, WeightsError, did_you_mean
from deeplabzoo.inference.optional import import_quietly
from deeplabzoo.models.deeplab import DeepLab
from deeplabzoo.zoo.exporting import LIBRARIES, write_exported
from deeplabzoo.zoo.origins.torchvision import BUILDERS

SMP_PREFIX = "smp:"
_EXTRAS = {
    "torchvision": "torchvision",
    "segmentation_models_pytorch": "segmentation-models-pytorch",
    "transformers": "transformers",
    "onnxruntime": "deeplabzoo[export]",
    "openvino": "deeplabzoo[openvino]",
    "onnxscript": "deeplabzoo[export]",
    "matplotlib": "deeplabzoo[train]",
    "torchmetrics": "torchmetrics",
    "tifffile": "deeplabzoo[large]",
}


def library(name: str) -> ModuleType:
    """Return an optional library; raises UsageError in one sentence, with the command that installs it, where it is missing."""
    try:
        return import_quietly(name)
    except ImportError:
        raise UsageError(f'{name} is not installed, and this needs it: pip install "{_EXTRAS[name]}".') from None


def counterpart(net: DeepLab, peer: str) -> nn.Module:
    """Return `net` as the network of torchvision, SMP or transformers: image_BCHW -> logits B x num_classes x H x W, eval mode.

    The tensors are those of `net`, under the library's names, loaded by its own loader with nothing missing or left over.
    Raises UsageError where the library is missing, or has no network that computes the same.
    """
    try:
        exported = LIBRARIES[peer](net)
    except WeightsError as error:
        raise UsageError(f"{peer} has no counterpart of this model: {error}") from None
    if peer == "torchvision":
        own = library("torchvision").models.segmentation
        with_aux = any(name.startswith("aux_classifier.") for name in exported.state_dict)
        build = getattr(own, BUILDERS[net.config.encoder])
        theirs = build(weights=None, weights_backbone=None, num_classes=net.num_classes, aux_loss=with_aux)
        theirs.load_state_dict(exported.state_dict)
        return _OfTorchvision(theirs).eval()
    with tempfile.TemporaryDirectory(prefix="deeplabzoo-benchmark-") as place:
        folder = Path(place) / "theirs"
        write_exported(exported, folder, peer)
        if peer == "smp":
            loaded: nn.Module = library("segmentation_models_pytorch").from_pretrained(str(folder))
            return loaded.eval()
        classes = library("transformers")
        (name,) = exported.settings["config.json"]["architectures"]
        return _OfTransformers(getattr(classes, name).from_pretrained(str(folder)), net.config.align_corners).eval()


def natural_counterpart(net: DeepLab) -> tuple[str, nn.Module]:
    """Return the first library that has this network, and the network there; ours, plain, where none has it."""
    for peer in LIBRARIES:
        try:
            return peer, counterpart(net, peer)
        except UsageError:
            continue
    return "deeplabzoo", net


def smp_network(name: str, num_classes: int) -> Any:
    """Return SMP's own DeepLab for `smp:deeplabv3plus_ENCODER` with its defaults and random weights.

    Raises UnknownNameError for another name, and UsageError where SMP is missing.
    """
    smp = library("segmentation_models_pytorch")
    architecture, _, encoder = name.removeprefix(SMP_PREFIX).partition("_")
    makers: Mapping[str, Callable[..., Any]] = {"deeplabv3": smp.DeepLabV3, "deeplabv3plus": smp.DeepLabV3Plus}
    if architecture not in makers or encoder not in (known := smp.encoders.get_encoder_names()):
        near = did_you_mean(encoder, known) if architecture in makers else ""
        raise UnknownNameError(
            f"'{name}' is not `smp:deeplabv3_ENCODER` or `smp:deeplabv3plus_ENCODER` of SMP's encoders.{near}"
        )
    return makers[architecture](encoder, encoder_weights=None, classes=num_classes)


class _OfTorchvision(nn.Module):
    """Its networks return a dictionary; nobody wants the auxiliary logits."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, image_BCHW: torch.Tensor) -> torch.Tensor:
        logits_BCHW: torch.Tensor = self.net(image_BCHW)["out"]
        return logits_BCHW


class _OfTransformers(nn.Module):
    """Its networks stop at low resolution; enlarged as its image processors do, with corners where the weights want them."""

    def __init__(self, net: nn.Module, align_corners: bool) -> None:
        super().__init__()
        self.net, self.align_corners = net, align_corners

    def forward(self, image_BCHW: torch.Tensor) -> torch.Tensor:
        logits_BChw = self.net(image_BCHW).logits
        return nn.functional.interpolate(
            logits_BChw, size=image_BCHW.shape[-2:], mode="bilinear", align_corners=self.align_corners
        )
