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
        self._state = TensorState(net)

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
        """Whether the model still has the tensors and the configuration that this optimized model was built from."""
        return self._state.matches(self.net)

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
    if reason := unsupported_reason(net):
        raise UsageError(f"The model cannot be optimized, since {reason}; run it as it is.")
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
    """Whether an optimized model computes the same as `net`: see `unsupported_reason`."""
    return not unsupported_reason(net)


def unsupported_reason(net: object) -> str:
    """Return why a model has no optimized form, as a phrase; empty if it has one.

    Layer fusion replaces convolutions and batch norms by others with the same weights. It would drop code that is attached to a
    layer (hooks, pruning masks, parametrizations) and cannot look into layers that are not ours (LoRA wrappers).
    """
    forward = getattr(net, "forward_low_resolution", None)
    if not isinstance(net, DeepLab) or getattr(forward, "__func__", None) is not DeepLab.forward_low_resolution:
        return f"{type(net).__name__} computes its logits in its own way"
    for name, module in net.named_modules():
        if torch.nn.utils.parametrize.is_parametrized(module):
            return f"'{name}' is parametrized ({', '.join(module.parametrizations)})"
        attached = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        if any(type(hook).__module__.startswith("torch.nn.utils") for hook in attached):  # pruning, weight_norm, spectral_norm
            return f"'{name}' is pruned or reparametrized by torch.nn.utils"
        if attached and not name.startswith("encoder"):  # timm's feature extractors are built of hooks themselves
            return f"'{name or type(net).__name__}' has forward hooks"
        known = type(module).__module__.startswith(("deeplabzoo.models.", "torch.nn.modules."))
        if name.startswith(("head", "aux_head")) and not known:
            return f"'{name}' is a {type(module).__name__}, which layer fusion does not know"
    return ""


def require_known_engine(engine: str, precision: str) -> None:
    """Raise UsageError, with the nearest name, for an engine or a precision that does not exist."""
    for what, name, known in (("engine", engine, ("auto", *ENGINES)), ("precision", precision, PRECISIONS)):
        if name not in known:
            raise UsageError(f"Unknown {what} {name!r}; expected one of {', '.join(known)}.{did_you_mean(name, known)}")


_SAMPLES = 32
"""Elements of each tensor that are compared, spread evenly."""
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integer type by size in bytes: numpy has no bfloat16, and bit patterns compare exactly."""


class TensorState:
    """What an optimized model was built from: identity and versions of all tensors, and a sample of their values.

    torch counts in-place writes to a tensor, but not those through `tensor.data`, which EMA code uses. So some elements of each
    tensor are compared as well; about 0.1 ms for 300 tensors on a CPU.
    """

    def __init__(self, net: DeepLab) -> None:
        modules = list(net.modules())
        self._net = net
        # walking the dictionaries of all modules costs a tenth of `net.parameters()`, which every image would pay for
        self._slots: list[dict[str, Any]] = [
            slots for module in modules for slots in (module._modules, module._parameters, module._buffers)
        ]
        tensors = [*net.parameters(), *net.buffers()]
        self._data = [one.data_ptr for one in tensors]
        self._counted = [one for one in tensors if not one.is_inference()]  # inference tensors have no version
        own = [module for name, module in net.named_modules() if not name.startswith("encoder")]
        self._hooks = [hooks for module in own for hooks in (module._forward_hooks, module._forward_pre_hooks)]
        self._on_cpu = net.device.type == "cpu"
        flat = [one.detach().reshape(-1) for one in tensors if one.is_contiguous() and one.element_size() in _INTEGERS]
        views = [one[:: max(1, one.numel() // _SAMPLES)].view(_INTEGERS[one.element_size()]) for one in flat if one.numel()]
        # numpy views share the memory of the tensors, and reading them costs a tenth of what torch's dispatcher does
        self._views: list[Any] = [one.numpy() for one in views] if self._on_cpu else views
        self._identity, self._values = self._identify(), self._sample()

    def matches(self, net: DeepLab) -> bool:
        """Whether tensors and configuration of `net` are unchanged since, and no hook was added."""
        return (
            not any(self._hooks) and self._net is net and self._identity == self._identify() and self._values == self._sample()
        )

    def _identify(self) -> tuple[Any, ...]:
        slots = [list(map(id, one.values())) for one in self._slots]
        return self._net.config, slots, [pointer() for pointer in self._data], [one._version for one in self._counted]

    def _sample(self) -> bytes:
        if self._on_cpu:
            return b"".join([one.tobytes() for one in self._views])
        by_size = [[one for one in self._views if one.element_size() == size] for size in _INTEGERS]
        return b"".join(torch.cat(views).cpu().numpy().tobytes() for views in by_size if views)
