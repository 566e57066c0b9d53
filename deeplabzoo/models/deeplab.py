"""DeepLab itself: an encoder, a head, and logits at the size of the image that came in.

Names in a state dict: `encoder.<timm's own names>`, `head.…` and `aux_head.…` (see heads.py), nothing in between.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self, TypeVar

import torch
import torch.nn.functional as F
from torch import nn

from deeplabzoo.data.classes import default_palette
from deeplabzoo.errors import UnsupportedStrideError, UsageError, WeightsError
from deeplabzoo.models.config import DeepLabConfig, Preprocessing
from deeplabzoo.models.encoder_table import canonical_encoder, check_output_stride
from deeplabzoo.models.encoders import build_encoder
from deeplabzoo.models.heads import AuxiliaryHead, V3Head, V3PlusHead
from deeplabzoo.models.layers import Classifier, scale_atrous_rates
from deeplabzoo.models.weight_transfer import (
    SkipInit,
    assign_state_dict,
    check_state_dict,
    has_non_state_tensors,
    transfer_tensors,
)

Palette = tuple[tuple[int, int, int], ...]
_Net = TypeVar("_Net", bound="DeepLab")


class TrainingOutput(NamedTuple):
    """What a network with an auxiliary head returns in training mode: both at the input's size, B x num_classes x H x W."""

    logits: torch.Tensor
    aux_logits: torch.Tensor


class DeepLab(nn.Module):
    """DeepLabV3 or DeepLabV3+ on any encoder of the table.

    Raises UnsupportedStrideError, UnknownNameError and UsageError at construction, never in the middle of a forward pass.

    >>> net = DeepLab(DeepLabConfig(architecture="deeplabv3plus", encoder="resnet18", num_classes=2)).eval()
    >>> net(torch.rand(1, 3, 65, 97)).shape
    torch.Size([1, 2, 65, 97])
    """

    def __init__(
        self,
        config: DeepLabConfig,
        *,
        classes: Sequence[str] | None = None,
        palette: Sequence[tuple[int, int, int]] | None = None,
        preprocessing: Preprocessing | None = None,
        encoder_pretrained: bool = False,
    ) -> None:
        super().__init__()
        self.weights_source: dict[str, Any] = {}
        """Which file the weights came from (`name`, `tag`, `sha256`, `source`, `adapted`); empty where there is none."""
        config = dataclasses.replace(config, encoder=canonical_encoder(config.encoder))
        self.config = config
        self.encoder, plan = build_encoder(config, pretrained=encoder_pretrained)
        self.feature_plan = plan
        in_channels = plan.channels[plan.last]
        self.head: V3Head | V3PlusHead
        if config.architecture == "deeplabv3":
            self.head = V3Head(config, in_channels)
        else:
            self.head = V3PlusHead(config, in_channels, plan.channels[plan.low_level])
        self.aux_head = AuxiliaryHead(config, plan.channels[plan.auxiliary]) if config.aux_head else None
        self.preprocessing = preprocessing or _encoder_preprocessing(self.encoder)
        self._set_classes(classes, palette)

    @classmethod
    def from_weights(
        cls,
        config: DeepLabConfig,
        state_dict: Mapping[str, torch.Tensor],
        *,
        classes: Sequence[str] | None = None,
        palette: Sequence[tuple[int, int, int]] | None = None,
        preprocessing: Preprocessing | None = None,
    ) -> Self:
        """Build the network that `config` describes with every tensor taken from `state_dict`, in float32, in eval mode.

        The fit is checked on shapes alone, before any memory is taken: a file that lies about its network costs nothing.
        The network is built without memory, and the tensors become its own, without a copy where their type is right. Raises
        WeightsError naming the tensors that are missing, left over or of another shape.
        """
        net = _build_on_meta(cls, config)
        check_state_dict(config, state_dict, {name: tensor.shape for name, tensor in net.state_dict().items()})
        if has_non_state_tensors(net):
            with SkipInit():
                net = cls(config)
        net.preprocessing = preprocessing or net.preprocessing
        net._set_classes(classes, palette)
        assign_state_dict(net, state_dict)
        return net.eval()

    @property
    def num_classes(self) -> int:
        """Channels of the logits."""
        return self.config.num_classes

    @property
    def output_stride(self) -> int:
        """Pixels per cell of the encoder's last feature: 8, 16 or 32."""
        return self.config.output_stride

    @property
    def device(self) -> torch.device:
        """Where the network's tensors are."""
        return next(self.parameters()).device

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names; label i is `classes[i]`."""
        return self._classes

    @property
    def palette(self) -> Palette:
        """One (red, green, blue) per class."""
        return self._palette

    def forward(self, image_BCHW: torch.Tensor) -> torch.Tensor | TrainingOutput:
        """Return logits B x num_classes x H x W for a normalize_images float image, at the image's own H x W.

        Always one tensor in eval mode; in training with an auxiliary head a TrainingOutput. Raises UsageError for an image of
        another rank, channel count or kind.
        """
        features = self._encode(image_BCHW)
        logits = self._upsample(self._run_head(features), image_BCHW)
        if self.aux_head is None or not self.training:
            return logits
        return TrainingOutput(logits, self._upsample(self.aux_head(features[self.feature_plan.auxiliary]), image_BCHW))

    def forward_low_resolution(self, image_BCHW: torch.Tensor) -> torch.Tensor:
        """Return the logits at the head's own size (V3: the output stride; V3+: stride 4), before any upsampling."""
        return self._run_head(self._encode(image_BCHW))

    @torch.no_grad()
    def predict_labels(self, image_BCHW: torch.Tensor) -> torch.Tensor:
        """Return the most likely class of every pixel: int64, B x H x W."""
        return self._upsample(self.forward_low_resolution(image_BCHW), image_BCHW).argmax(dim=1)

    def optimize(
        self,
        engine: str = "torch",
        *,
        precision: str = "fp32",
        size: tuple[int, int] | None = None,
        calibration: Any = None,
    ) -> Any:
        """Return this network, as it is now, as an OptimizedDeepLab: a faster form for inference alone, equal up to rounding.

        `engine` is torch, compiled, onnxruntime, openvino, or auto, which measures; `deeplabzoo.optimize` documents
        `precision`, `size`, `calibration` and the errors. Training or changing the network afterwards does not change
        what is returned.
        """
        from deeplabzoo.optimization.optimized_model import optimize  # upward edge, named in test_architecture.py

        return optimize(self, engine, precision=precision, size=size, calibration=calibration)

    def set_output_stride(self, output_stride: int) -> None:
        """Run the same weights at another output stride: encoder and ASPP are re-dilated together (DeepLabV3, section 4.1).

        The Parameter objects stay the very same (an optimizer keeps working), as do dtype, device, training flags and
        requires_grad; rates keep their reach in pixels. Forward hooks inside the encoder are lost, as its modules are new.
        Raises UnsupportedStrideError where the encoder cannot, or needs other tensors there; nothing is changed then.
        """
        config = self.config
        if output_stride == config.output_stride:
            return
        rates = config.atrous_rates and scale_atrous_rates(config.atrous_rates, config.output_stride, output_stride)
        target = dataclasses.replace(config, output_stride=output_stride, atrous_rates=rates)
        facts = check_output_stride(config.encoder, output_stride)
        if not facts.shares_weights(config.output_stride, output_stride):
            raise UnsupportedStrideError(
                f"Encoder '{facts.short_name}' has other tensors at output stride {output_stride} than at "
                f"{config.output_stride} (a shortcut appears or disappears), so its weights cannot move; "
                f"create it with output_stride={output_stride} instead."
            )
        with SkipInit():
            encoder, plan = build_encoder(target)
        transfer_tensors(encoder, self.encoder)
        self.encoder, self.feature_plan = encoder, plan
        self.head.aspp.update_dilation(target)
        self.config = target

    def reset_classifier(
        self,
        num_classes: int,
        classes: Sequence[str] | None = None,
        palette: Sequence[tuple[int, int, int]] | None = None,
    ) -> None:
        """Give the network a new, untrained last layer (and the auxiliary head too) for another set of classes."""
        config = dataclasses.replace(self.config, num_classes=num_classes)
        self._set_classes(classes, palette, num_classes)
        self.config = config
        for head in (self.head, self.aux_head):
            if head is not None:
                old = head.classifier.weight
                head.classifier = Classifier(old.shape[1], num_classes).to(old)

    def save(self, path: str | Path, *, dtype: torch.dtype | None = None, extra: Mapping[str, Any] | None = None) -> None:
        """Write a safetensors file that holds enough to rebuild this network; `dtype=torch.float16` halves it.

        `extra`, or else `weights_source`, is kept in it as the weights' source. Raises OutputError where the file cannot be
        written; an existing file is then left as it was.
        """
        from deeplabzoo.checkpoints.native import save_checkpoint  # upward edge, named in test_architecture.py

        save_checkpoint(self, path, extra=self.weights_source if extra is None else extra, dtype=dtype)

    def push_to_hub(
        self,
        repo: str,
        *,
        token: str | None = None,
        private: bool | None = None,
        commit_message: str | None = None,
        reports: Sequence[Any] = (),
        license: str | None = None,
        photo: str | Path | None = None,
    ) -> str:
        """Put the network on the Hugging Face Hub and return the commit; `create("hf-hub:owner/repo")` reads it back.

        The repository, made if it is not there, gets model.safetensors, a readable config.json and a model card. The card has
        the figures of a released file whose tensors these are, and of `reports` that `deeplabzoo.evaluate` made of this very
        network; `license` are the weights' terms, `photo` is a picture that may be shown. Without `token` that of
        `hf auth login` counts. Raises UsageError for a wrong name or a report of other tensors, WeightsError for weights that
        are no finite numbers, DownloadError where the network is switched off, OutputError where the Hub refuses.
        """
        from deeplabzoo.publish.push_to_hub import push_to_hub  # upward edge, named in test_architecture.py

        return push_to_hub(
            self,
            repo,
            token=token,
            private=private,
            commit_message=commit_message,
            reports=reports,
            license=license,
            photo=photo,
        )

    def _encode(self, image_BCHW: torch.Tensor) -> list[torch.Tensor]:
        check_image(self.config, image_BCHW)
        return list(self.encoder(image_BCHW))

    def _run_head(self, features: list[torch.Tensor]) -> torch.Tensor:
        high = features[self.feature_plan.last]
        inputs = (high,) if isinstance(self.head, V3Head) else (high, features[self.feature_plan.low_level])
        logits: torch.Tensor = self.head(*inputs)
        return logits

    def _upsample(self, logits: torch.Tensor, image_BCHW: torch.Tensor) -> torch.Tensor:
        size = image_BCHW.shape[-2:]
        return F.interpolate(logits, size=size, mode="bilinear", align_corners=self.config.align_corners)

    def _set_classes(
        self,
        classes: Sequence[str] | None,
        palette: Sequence[tuple[int, int, int]] | None,
        num_classes: int | None = None,
    ) -> None:
        count = num_classes or self.config.num_classes
        names = tuple(classes) if classes is not None else tuple(f"class_{index}" for index in range(count))
        colours = tuple(tuple(colour) for colour in palette) if palette is not None else default_palette(count)
        if len(names) != count or len(colours) != count:
            raise UsageError(
                f"A network of {count} classes needs as many names and colours, not {len(names)} and {len(colours)}."
            )
        self._classes: tuple[str, ...] = names
        self._palette: Palette = colours  # type: ignore[assignment]


def check_image(config: DeepLabConfig, image_BCHW: torch.Tensor) -> None:
    """Raise UsageError for an image of another rank, channel count or kind than a network of this configuration takes."""
    channels = config.in_chans
    if image_BCHW.ndim != 4 or image_BCHW.shape[1] != channels:
        raise UsageError(
            f"This network expects a batch of images of shape B x {channels} x H x W, not {tuple(image_BCHW.shape)}."
        )
    if not image_BCHW.is_floating_point():
        raise UsageError(
            f"This network expects a normalize_images float image, not {image_BCHW.dtype}; see `net.preprocessing`."
        )


def _build_on_meta(cls: type[_Net], config: DeepLabConfig) -> _Net:
    try:
        with torch.device("meta"):
            return cls(config)
    except (RuntimeError, OverflowError) as error:
        raise WeightsError(
            f"The file's configuration describes no network that could exist: {_non_default_fields(config)}."
        ) from error


def _non_default_fields(config: DeepLabConfig) -> str:
    """Return the fields of a configuration that differ from their defaults; all of them would fill a page."""
    fields = {field.name: (getattr(config, field.name), field.default) for field in dataclasses.fields(config)}
    return ", ".join(f"{name}={value!r}" for name, (value, default) in fields.items() if value != default)


def _encoder_preprocessing(encoder: nn.Module) -> Preprocessing:
    """Return the mean and std that timm's ImageNet weights of this encoder expect; the usual ones for our own encoders."""
    published = getattr(encoder, "pretrained_cfg", None) or {}
    default = Preprocessing()
    return Preprocessing(mean=tuple(published.get("mean", default.mean)), std=tuple(published.get("std", default.std)))
