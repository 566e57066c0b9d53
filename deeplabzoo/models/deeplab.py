"""The DeepLab model: an encoder, a head, and logits at the size of the image; and how tensors are put into it.

Names in a state dict: `encoder.<timm's own names>`, `head.…` and `aux_head.…` (see heads.py).
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self, TypeVar

import torch
import torch.fx
import torch.nn.functional as F
from torch import nn

from deeplabzoo.data.classes import default_palette
from deeplabzoo.errors import UnsupportedStrideError, UsageError, WeightsError
from deeplabzoo.models.config import DeepLabConfig, Preprocessing
from deeplabzoo.models.encoder_table import FeaturePlan, canonical_encoder, check_output_stride
from deeplabzoo.models.encoders import SkipInit, build_encoder, transfer_tensors
from deeplabzoo.models.heads import AuxiliaryHead, V3Head, V3PlusHead
from deeplabzoo.models.layers import Classifier, scale_atrous_rates

Palette = tuple[tuple[int, int, int], ...]
_Net = TypeVar("_Net", bound="DeepLab")


class TrainingOutput(NamedTuple):
    """What a model with an auxiliary head returns in training mode: both B x num_classes x H x W, at the image's size."""

    logits: torch.Tensor
    aux_logits: torch.Tensor


class DeepLab(nn.Module):
    """DeepLabV3 or DeepLabV3+ on any encoder of the table, with random weights, in training mode.

    Args:
        config: Architecture, encoder and every option of their arithmetic.
        classes: A name for each class; None gives `class_0`, `class_1`, …
        palette: A colour (red, green, blue), 0...255, for each class; None gives PASCAL VOC's colour map.
        preprocessing: How an image becomes the model's input; None takes mean and std of the encoder's ImageNet weights.
        encoder_pretrained: Download timm's ImageNet weights for the encoder.

    Raises:
        UnsupportedStrideError: The encoder cannot run at the output stride.
        UnknownNameError: There is no such encoder.
        UsageError: Options, or counts of names and colours, that do not go together.
        DownloadError: The ImageNet weights could not be downloaded.

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
        """The file that the weights came from (`name`, `tag`, `sha256`, `source`, `adapted`); empty for random weights."""
        config = dataclasses.replace(config, encoder=canonical_encoder(config.encoder))
        self.config = config
        self.encoder, plan = build_encoder(config, pretrained=encoder_pretrained)
        self.feature_plan: FeaturePlan = plan
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
        """Build a model with every tensor taken from `state_dict`, in float32, in eval mode.

        Names and shapes are compared before memory is allocated, and the tensors become the model's own, without a copy where
        their dtype is right.

        Args:
            config: Architecture, encoder and every option of their arithmetic.
            state_dict: Tensors by name, exactly those of the model.
            classes: A name for each class; None gives `class_0`, `class_1`, …
            palette: A colour (red, green, blue), 0...255, for each class; None gives PASCAL VOC's colour map.
            preprocessing: How an image becomes the model's input; None takes mean and std of the encoder's ImageNet weights.

        Raises:
            WeightsError: Tensors that are missing, left over or of another shape; the message names them.
        """
        options: dict[str, Any] = {"classes": classes, "palette": palette, "preprocessing": preprocessing}
        net = _build_on_meta(cls, config, **options)
        check_state_dict(config, state_dict, {name: tensor.shape for name, tensor in net.state_dict().items()})
        if has_non_state_tensors(net):
            with SkipInit():
                net = cls(config, **options)
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
        """The device of the model's tensors."""
        return next(self.parameters()).device

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names; label i is `classes[i]`. One output channel has two: background and foreground. Raises UsageError."""
        self.check_classifier()
        return self._classes

    @property
    def palette(self) -> Palette:
        """One (red, green, blue) per class."""
        return self._palette

    def check_classifier(self) -> None:
        """Raise UsageError where the classifier does not yield `num_classes` channels: it was replaced by hand."""
        counts = [conv.out_channels for conv in self.head.classifier.modules() if isinstance(conv, nn.Conv2d)]
        if counts and counts[-1] != self.config.num_classes:
            raise UsageError(
                f"The classifier was replaced by one of {counts[-1]} classes, but the model has {self.config.num_classes} and "
                f"names for these; use net.reset_classifier({counts[-1]}), which changes all of them."
            )

    def forward(self, image_BCHW: torch.Tensor) -> torch.Tensor | TrainingOutput:
        """Return the logits of a batch of images.

        Args:
            image_BCHW: Normalized float images, B x in_chans x H x W, as `preprocessing` describes.

        Returns:
            Logits B x num_classes x H x W. In training mode, a model with an auxiliary head returns a TrainingOutput instead.

        Raises:
            UsageError: An image of another rank, channel count or dtype.
        """
        features = self._encode(image_BCHW)
        logits = self._upsample(self._run_head(features), image_BCHW)
        if self.aux_head is None or not self.training:
            return logits
        return TrainingOutput(logits, self._upsample(self.aux_head(features[self.feature_plan.auxiliary]), image_BCHW))

    def forward_low_resolution(self, image_BCHW: torch.Tensor) -> torch.Tensor:
        """Return the logits before upsampling: B x num_classes x h x w at the output stride (V3) or at stride 4 (V3+)."""
        return self._run_head(self._encode(image_BCHW))

    @torch.no_grad()
    def predict_labels(self, image_BCHW: torch.Tensor) -> torch.Tensor:
        """Return the most likely class of every pixel: int64, B x H x W."""
        logits_BCHW = self._upsample(self.forward_low_resolution(image_BCHW), image_BCHW)
        return (logits_BCHW[:, 0] > 0).long() if logits_BCHW.shape[1] == 1 else logits_BCHW.argmax(dim=1)

    def optimize(
        self,
        engine: str = "torch",
        *,
        precision: str = "fp32",
        size: tuple[int, int] | None = None,
        calibration: Any = None,
    ) -> Any:
        """Return the model as it is now as an OptimizedDeepLab: faster, for inference only, equal up to rounding.

        Args:
            engine: `torch`, `compiled`, `onnxruntime`, `openvino`, or `auto`, which measures them.
            precision: `fp32`, `bf16` or `int8`; see `deeplabzoo.optimize`.
            size: (height, width) in pixels of every image, where it is fixed.
            calibration: Images that `int8` is calibrated with.

        Returns:
            The optimized model; training or changing this one afterwards does not change it.

        Raises:
            UsageError: Options that do not go together, or a backend that is not installed.
        """
        from deeplabzoo.optimization.optimized_model import optimize  # upward edge, named in test_architecture.py

        return optimize(self, engine, precision=precision, size=size, calibration=calibration)

    def set_output_stride(self, output_stride: int) -> None:
        """Run the same weights at another output stride: encoder and ASPP are re-dilated together (DeepLabV3, section 4.1).

        The Parameter objects stay the same (an optimizer keeps working), and so do dtype, device, training flags and
        requires_grad; atrous rates keep their reach in pixels. Forward hooks inside the encoder are lost: its modules are new.

        Args:
            output_stride: Pixels per cell of the encoder's last feature: 8, 16 or 32.

        Raises:
            UnsupportedStrideError: The encoder cannot run at this stride, or has other tensors there; nothing is changed.
        """
        if output_stride == self.config.output_stride:
            return
        target = config_at_stride(self.config, output_stride)
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
        """Replace the last layer, and that of the auxiliary head, by a randomly initialized one for other classes.

        Args:
            num_classes: Number of classes, background included.
            classes: A name for each; None gives `class_0`, `class_1`, …
            palette: A colour (red, green, blue) for each; None gives PASCAL VOC's colour map.

        Raises:
            UsageError: As many names and colours as classes are needed.
        """
        config = dataclasses.replace(self.config, num_classes=num_classes)
        self._set_classes(classes, palette, num_classes)
        self.config = config
        for head in (self.head, self.aux_head):
            if head is not None:
                old = head.classifier.weight
                head.classifier = Classifier(old.shape[1], num_classes).to(old)

    def save(self, path: str | Path, *, dtype: torch.dtype | None = None, extra: Mapping[str, Any] | None = None) -> None:
        """Write a safetensors file from which `deeplabzoo.load` rebuilds this model.

        Args:
            path: File to write; an existing one is replaced as a whole or not at all.
            dtype: Floating-point type in the file; `torch.float16` halves its size. None keeps the model's.
            extra: JSON values kept as the weights' source; None keeps `weights_source`.

        Raises:
            OutputError: The file cannot be written.
            UsageError: Layers were replaced by hand, so that the file could not be loaded.
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
        """Upload the model to the Hugging Face Hub; `create("hf-hub:owner/repo")` reads it back.

        The repository, which is created if it does not exist, gets model.safetensors, a readable config.json and a model card.
        The card has the metrics of a released checkpoint whose tensors these are, and those of `reports`.

        Args:
            repo: `owner/name` of the repository.
            token: Access token; None takes that of `hf auth login`.
            private: Whether a new repository is private; None takes the account's default.
            commit_message: Message of the commit.
            reports: Reports that `deeplabzoo.evaluate` made of this model.
            license: Licence of the weights.
            photo: An image that may be published, shown on the card with its labels.

        Returns:
            The commit's id.

        Raises:
            UsageError: A wrong name, or a report of other tensors.
            WeightsError: Weights that are not finite.
            DownloadError: The network is switched off.
            OutputError: The Hub refuses the upload.
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
        _check_image(self.config.in_chans, image_BCHW)
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
        if count == 1:  # one channel is the logit of a sigmoid: two labels, of which a single name and colour are the second's
            count = 2
            classes = ("background", *(classes or ("foreground",))) if classes is None or len(classes) == 1 else classes
            palette = ((0, 0, 0), *palette) if palette is not None and len(palette) == 1 else palette
        names = tuple(classes) if classes is not None else tuple(f"class_{index}" for index in range(count))
        colours = tuple(tuple(colour) for colour in palette) if palette is not None else default_palette(count)
        if len(names) != count or len(colours) != count:
            raise UsageError(
                f"A model of {count} classes needs as many names and colours, not {len(names)} and {len(colours)}."
            )
        self._classes: tuple[str, ...] = names
        self._palette: Palette = colours  # type: ignore[assignment]


def config_at_stride(config: DeepLabConfig, output_stride: int) -> DeepLabConfig:
    """Return the configuration with which the same weights run at another output stride, atrous rates scaled with it.

    Raises UnsupportedStrideError where the encoder cannot run at it, or has other tensors there.
    """
    rates = config.atrous_rates and scale_atrous_rates(config.atrous_rates, config.output_stride, output_stride)
    target = dataclasses.replace(config, output_stride=output_stride, atrous_rates=rates)
    info = check_output_stride(config.encoder, output_stride)
    if not info.shares_weights(config.output_stride, output_stride):
        raise UnsupportedStrideError(
            f"Encoder '{info.short_name}' has other tensors at output stride {output_stride} than at "
            f"{config.output_stride} (a shortcut appears or disappears), so its weights cannot move; "
            f"create it with output_stride={output_stride} instead."
        )
    return target


def check_image(config: DeepLabConfig, image_BCHW: torch.Tensor) -> None:
    """Raise UsageError for an image of another rank, channel count or dtype than a model of this configuration takes."""
    _check_image(config.in_chans, image_BCHW)


@torch.fx.wrap  # one call in a traced graph: its conditions depend on the image
def _check_image(channels: int, image_BCHW: torch.Tensor) -> None:
    if image_BCHW.ndim != 4 or image_BCHW.shape[1] != channels:
        raise UsageError(
            f"This model expects a batch of images of shape B x {channels} x H x W, not {tuple(image_BCHW.shape)}."
        )
    if not image_BCHW.is_floating_point():
        raise UsageError(f"This model expects a normalized float image, not {image_BCHW.dtype}; see `net.preprocessing`.")


def _build_on_meta(cls: type[_Net], config: DeepLabConfig, **options: Any) -> _Net:
    try:
        with torch.device("meta"), SkipInit():
            return cls(config, **options)
    except (RuntimeError, OverflowError) as error:
        raise WeightsError(
            f"The file's configuration describes no model that could exist: {_non_default_fields(config)}."
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


def has_non_state_tensors(module: nn.Module) -> bool:
    """Return whether a module has tensors that are in no state dict: non-persistent buffers, or plain attributes."""
    in_state = set(module.state_dict())
    if any(name not in in_state for name, _ in module.named_buffers()):
        return True
    return any(isinstance(value, torch.Tensor) for part in module.modules() for value in vars(part).values())


def assign_state_dict(net: nn.Module, state_dict: Mapping[str, torch.Tensor]) -> None:
    """Make the tensors of `state_dict`, whose names and shapes were checked, those of `net`.

    They are copied only where dtype or layout is another, or where two names share one. Parameters keep their requires_grad.
    """
    taken: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for name, like in net.state_dict().items():
        tensor = state_dict[name].detach().to("cpu", like.dtype).contiguous()
        if tensor.data_ptr() in seen:  # two parameters that share memory would be trained as one
            tensor = tensor.clone()
        seen.add(tensor.data_ptr())
        taken[name] = tensor
    net.load_state_dict(taken, assign=True)


def check_state_dict(config: DeepLabConfig, state_dict: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Size]) -> None:
    """Raise WeightsError unless `state_dict` has exactly the tensors and shapes of the model that `config` describes."""
    missing = sorted(expected.keys() - state_dict.keys())
    extra = sorted(state_dict.keys() - expected.keys())
    wrong = [
        f"{name} is {tuple(state_dict[name].shape)}, expected {tuple(shape)}"
        for name, shape in expected.items()
        if name in state_dict and state_dict[name].shape != shape
    ]
    problems = [
        f"{len(names)} tensors {what} ({'; '.join(names[:3])}{' …' if len(names) > 3 else ''})"
        for names, what in ((missing, "are missing"), (extra, "are left over"), (wrong, "have another shape"))
        if names
    ]
    if not problems:
        return
    model = f"{config.architecture} on {config.encoder} with {config.num_classes} classes"
    architecture = "deeplabv3plus" if "head.low_level.conv.weight" in state_dict else "deeplabv3"
    mixed_up = f" These are the weights of a {architecture}." if architecture != config.architecture else ""
    raise WeightsError(f"The weights do not fit {model}: {', '.join(problems)}.{mixed_up}")
