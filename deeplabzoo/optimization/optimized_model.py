"""`net.optimize()`: the same weights and the same answer in a form for inference alone, run by an engine chosen by name."""

import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from deeplabzoo.errors import UsageError, did_you_mean
from deeplabzoo.models.config import DeepLabConfig, Preprocessing
from deeplabzoo.models.deeplab import DeepLab, Palette, check_image
from deeplabzoo.processing.postprocessing import compile_postprocessing, upsample_argmax

if TYPE_CHECKING:
    from deeplabzoo.optimization.quantization import CalibrationImages


ENGINES = ("torch", "compiled", "onnxruntime", "openvino")
PRECISIONS = ("fp32", "bf16", "fp16", "int8")

_MODULES = {
    name: f"deeplabzoo.optimization.backends.{name}_backend" for name in ("torch", "compiled", "onnxruntime", "openvino")
}
"""Backends are imported when they are asked for, since each but torch needs an optional library."""


class OptimizedDeepLab:
    """A network as it was when it was optimised, ready to run: later changes of the network do not reach it.

    It answers as the network does in eval mode, without gradients.
    """

    def __init__(self, net: DeepLab, forward: Callable[[torch.Tensor], torch.Tensor], engine: str, precision: str) -> None:
        self.net = net
        """The network that it was made of, as it is now."""
        self.config: DeepLabConfig = net.config
        self.classes: tuple[str, ...] = net.classes
        self.palette: Palette = net.palette
        self.preprocessing: Preprocessing = net.preprocessing
        self.weights_source: dict[str, Any] = dict(net.weights_source)
        self.device = net.device
        self.engine, self.precision = engine, precision
        self._forward = forward
        self._state = tensor_versions(net)

    @property
    def num_classes(self) -> int:
        """Channels of the logits."""
        return self.config.num_classes

    @property
    def output_stride(self) -> int:
        """Pixels per cell of the encoder's last feature: 8, 16 or 32."""
        return self.config.output_stride

    @property
    def current(self) -> bool:
        """Whether the network still has the tensors and the configuration that this form was made of."""
        return self._state == tensor_versions(self.net)

    def __call__(self, image_BCHW: torch.Tensor) -> torch.Tensor:
        """Return float32 logits B x num_classes x H x W at the image's own size; raises UsageError as the network does."""
        low_BCHW = self.forward_low_resolution(image_BCHW)
        size = image_BCHW.shape[-2:]
        return F.interpolate(low_BCHW, size=size, mode="bilinear", align_corners=self.config.align_corners)

    def forward_low_resolution(self, image_BCHW: torch.Tensor) -> torch.Tensor:
        """Return float32 logits at the head's own size, in channels_last memory."""
        check_image(self.config, image_BCHW)
        return self._forward(image_BCHW)

    def predict_labels(self, image_BCHW: torch.Tensor) -> torch.Tensor:
        """Return the most likely class of every pixel, B x H x W, without holding full-size logits: uint8 up to 256 classes."""
        low_BCHW = self.forward_low_resolution(image_BCHW)
        height, width = image_BCHW.shape[-2:]
        return upsample_argmax(low_BCHW, (height, width), align_corners=self.config.align_corners)


def optimize(
    net: DeepLab,
    engine: str = "torch",
    *,
    precision: str = "fp32",
    size: tuple[int, int] | None = None,
    calibration: "CalibrationImages | None" = None,
) -> OptimizedDeepLab:
    """Return the network in its inference form, run by `engine`: torch, compiled, onnxruntime, openvino, or auto.

    `auto` times the installed engines on one image of `size` (height, width; default: the weights' own) unless it did so
    before on this machine, and takes the fastest; it never takes `compiled`. `precision` is what the engine computes in, never
    changed silently: fp32, bf16, fp16 or int8, which needs `calibration`, real photos.

    Whoever optimises has more than a few photos, so the loops that make labels are compiled too (seconds, once a machine; with
    numba, the extra `fast`).

    Raises UsageError for unknown names and for a precision that the engine or the hardware has not, DeepLabZooError where an
    engine's library is missing.
    """
    form = build_optimized(net, engine, precision=precision, size=size, calibration=calibration)
    if form.device.type == "cpu":
        compile_postprocessing()
    return form


def build_optimized(
    net: DeepLab,
    engine: str,
    *,
    precision: str = "fp32",
    size: tuple[int, int] | None = None,
    calibration: "CalibrationImages | None" = None,
) -> OptimizedDeepLab:
    """Return what `optimize` returns, with nothing compiled that a single photo does not pay for; raises as it does."""
    require_known_engine(engine, precision)
    if not is_optimizable(net):
        raise UsageError(
            f"{type(net).__name__} computes its logits in its own way, so it has no inference form; run it as it is."
        )
    if engine == "auto":
        engine = importlib.import_module("deeplabzoo.optimization.autotune").fastest_engine(net, size, precision)
    if net.device.type != "cpu" and engine in ("onnxruntime", "openvino"):
        raise UsageError(f"The engine '{engine}' runs on the CPU, and the network is on {net.device}; use engine='torch'.")
    build = importlib.import_module(_MODULES[engine]).build
    options: dict[str, Any] = {"size": size} if engine == "compiled" else {}
    if engine in ("onnxruntime", "openvino"):
        options = {"calibration": calibration}
    return OptimizedDeepLab(net, build(net, precision, **options), engine, precision)


def is_optimizable(net: object) -> bool:
    """Whether a network computes what DeepLab does: a class that answers in its own way has no inference form."""
    answers = getattr(net, "forward_low_resolution", None)
    return isinstance(net, DeepLab) and getattr(answers, "__func__", None) is DeepLab.forward_low_resolution


def require_known_engine(engine: str, precision: str) -> None:
    """Raise UsageError, with the nearest name, for an engine or a precision that does not exist."""
    for what, name, known in (("engine", engine, ("auto", *ENGINES)), ("precision", precision, PRECISIONS)):
        if name not in known:
            raise UsageError(f"Unknown {what} {name!r}; expected one of {', '.join(known)}.{did_you_mean(name, known)}")


def tensor_versions(net: DeepLab) -> tuple[Any, ...]:
    """Return what changes whenever a tensor of the network is written, replaced or moved, or its configuration changes."""
    tensors = [*net.parameters(), *net.buffers()]
    return (net.config, *((id(one), 0 if one.is_inference() else one._version, one.device) for one in tensors))
