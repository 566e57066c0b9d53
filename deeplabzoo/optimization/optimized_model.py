"""`net.optimize()`: the same weights in a form for inference alone, run by a backend chosen by name or by measurement."""

import hashlib
import importlib
import importlib.metadata
import importlib.util
import json
import platform
import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from deeplabzoo.errors import DeepLabZooError, UsageError, did_you_mean
from deeplabzoo.files import ensure_folder, write_atomically
from deeplabzoo.hub.download import cache_folder
from deeplabzoo.log import logger
from deeplabzoo.models.config import DeepLabConfig, Preprocessing
from deeplabzoo.models.deeplab import DeepLab, Palette, check_image
from deeplabzoo.models.layers import ConvNormAct
from deeplabzoo.processing.postprocessing import compile_postprocessing, upsample_argmax

if TYPE_CHECKING:
    from deeplabzoo.optimization.quantization import CalibrationImages


ENGINES = ("torch", "compiled", "onnxruntime", "openvino")
PRECISIONS = ("fp32", "bf16", "fp16", "int8")


class OptimizedDeepLab:
    """A snapshot of a model for inference: outputs of eval mode without gradients; later changes of the model do not affect it.

    Args:
        net: The model that the snapshot was made of.
        forward: Normalized images B x C x H x W -> float32 low-resolution logits B x num_classes x h x w.
        engine: Name of the backend.
        precision: fp32, bf16, fp16 or int8.
    """

    def __init__(self, net: DeepLab, forward: Callable[[torch.Tensor], torch.Tensor], engine: str, precision: str) -> None:
        self.net = net
        """The model that it was made of, in its present state."""
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
        """Return float32 logits B x num_classes x H x W at the size of the image; raises UsageError as the model does."""
        low_BCHW = self.forward_low_resolution(image_BCHW)
        size = image_BCHW.shape[-2:]
        return F.interpolate(low_BCHW, size=size, mode="bilinear", align_corners=self.config.align_corners)

    def forward_low_resolution(self, image_BCHW: torch.Tensor) -> torch.Tensor:
        """Return float32 logits at the resolution of the head, in channels_last memory."""
        check_image(self.config, image_BCHW)
        return self._forward(image_BCHW)

    def predict_labels(self, image_BCHW: torch.Tensor) -> torch.Tensor:
        """Return the most likely class of every pixel, B x H x W (uint8 up to 256 classes), without full-size logits."""
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
    """Return the model in its optimized form for inference, equal up to rounding (float32).

    The compiled postprocessing is prepared, too (seconds, once per machine; with numba, the extra `fast`).

    Args:
        net: The model; it is not changed.
        engine: `torch`, `compiled`, `onnxruntime`, `openvino`, or `auto`: the fastest installed backend, measured once per
            machine and model on one image of `size` (`compiled` is never chosen).
        precision: fp32, bf16, fp16 or int8; never changed silently.
        size: (height, width) in pixels for `auto` and `compiled`; default: that of the preprocessing.
        calibration: Real images for int8.

    Raises:
        UsageError: Unknown names, a precision that backend or hardware lack, or a model that cannot be optimized.
        DeepLabZooError: The library of a backend is missing.
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
    """Return what `optimize` returns, without compiled postprocessing, which does not pay for a single image."""
    require_known_engine(engine, precision)
    if reason := unsupported_reason(net):
        raise UsageError(f"The model cannot be optimized, since {reason}; run it as it is.")
    if engine == "auto":
        engine = fastest_engine(net, size, precision)
    if net.device.type != "cpu" and engine in ("onnxruntime", "openvino"):
        raise UsageError(f"The engine '{engine}' runs on the CPU, but the model is on {net.device}; use engine='torch'.")
    # backends are imported on demand, since each but torch needs an optional library
    if engine in ("torch", "compiled"):
        from deeplabzoo.optimization import torch_backend

        compiled = engine == "compiled"
        forward = (
            torch_backend.build_compiled(net, precision, size=size) if compiled else torch_backend.build_torch(net, precision)
        )
    else:
        from deeplabzoo.optimization import graph_backend

        build = graph_backend.build_onnxruntime if engine == "onnxruntime" else graph_backend.build_openvino
        forward = build(net, precision, calibration=calibration)
    return OptimizedDeepLab(net, forward, engine, precision)


def is_optimizable(net: object) -> bool:
    """Whether an optimized model computes the same as `net`: see `unsupported_reason`."""
    return not unsupported_reason(net)


def unsupported_reason(net: object) -> str:
    """Return why a model has no optimized form, as a phrase; empty if it has one.

    Layer fusion replaces convolutions and batch norms by others with the same weights. It would drop code that is attached to a
    layer (hooks, pruning masks, parametrizations, a `forward` set on the instance) and cannot look into layers that are not
    ours (LoRA wrappers, a classifier of several layers).
    """
    forward = getattr(net, "forward_low_resolution", None)
    if not isinstance(net, DeepLab) or getattr(forward, "__func__", None) is not DeepLab.forward_low_resolution:
        return f"{type(net).__name__} computes its logits in its own way"
    for name, module in net.named_modules():
        if type(module).__module__.startswith("torch.ao."):
            return f"'{name}' is a {type(module).__name__} of torch.ao (quantization-aware training)"
        if torch.nn.utils.parametrize.is_parametrized(module):
            return f"'{name}' is parametrized ({', '.join(module.parametrizations)})"
        if "forward" in vars(module):
            return f"the forward method of '{name or type(net).__name__}' was replaced"
        attached = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        if any(type(hook).__module__.startswith("torch.nn.utils") for hook in attached):  # pruning, weight_norm, spectral_norm
            return f"'{name}' is pruned or reparametrized by torch.nn.utils"
        if attached and not name.startswith("encoder"):  # timm's feature extractors are built of hooks themselves
            return f"'{name or type(net).__name__}' has forward hooks"
        known = type(module).__module__.startswith(("deeplabzoo.models.", "torch.nn.modules."))
        if name.startswith(("head", "aux_head")) and not known:
            return f"'{name}' is a {type(module).__name__}, which layer fusion does not know"
    for name, kind in _FIXED_LAYERS.items():
        module = dict(net.head.named_modules()).get(name)
        if module is not None and not isinstance(module, kind):
            return f"'head.{name}' is a {type(module).__name__}, not a {kind.__name__}"
    return ""


_FIXED_LAYERS: dict[str, type[torch.nn.Module]] = {
    **dict.fromkeys(("aspp.pool", "aspp.project", "low_level"), ConvNormAct),
    **dict.fromkeys(("aspp.project.conv", "low_level.conv", "classifier"), torch.nn.Conv2d),
}
"""Layers of a head that layer fusion splits or whose channels it reads, by name."""


def require_known_engine(engine: str, precision: str) -> None:
    """Raise UsageError, with the nearest name, for an unknown engine or precision."""
    for what, name, known in (("engine", engine, ("auto", *ENGINES)), ("precision", precision, PRECISIONS)):
        if name not in known:
            near = did_you_mean(name, known) if isinstance(name, str) else ""
            raise UsageError(f"Unknown {what} {name!r}; expected one of {', '.join(known)}.{near}")


_WHOLE, _SAMPLES = 8192, 512
"""Tensors of at most `_WHOLE` elements (classifiers, biases, most of a small encoder) are compared whole, others by `_SAMPLES`
elements, spread evenly."""
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
        self._attributes = [vars(module) for module in modules]
        self._on_cpu = net.device.type == "cpu"
        flat = [one.detach().reshape(-1) for one in tensors if one.is_contiguous() and one.element_size() in _INTEGERS]
        views = [
            one[:: 1 if one.numel() <= _WHOLE else one.numel() // _SAMPLES].view(_INTEGERS[one.element_size()])
            for one in flat
            if one.numel()
        ]
        # numpy views share the memory of the tensors, and reading them costs a tenth of what torch's dispatcher does
        self._views: list[Any] = [one.numpy() for one in views] if self._on_cpu else views
        self._identity, self._values = self._identify(), self._sample()

    def matches(self, net: DeepLab) -> bool:
        """Whether tensors and configuration of `net` are unchanged since, no hook was added, and no forward replaced."""
        return (
            not any(self._hooks)
            and not any("forward" in attributes for attributes in self._attributes)
            and self._net is net
            and self._identity == self._identify()
            and self._values == self._sample()
        )

    def _identify(self) -> tuple[Any, ...]:
        slots = [list(map(id, one.values())) for one in self._slots]
        return self._net.config, slots, [pointer() for pointer in self._data], [one._version for one in self._counted]

    def _sample(self) -> bytes:
        if self._on_cpu:
            return b"".join([one.tobytes() for one in self._views])
        by_size = [[one for one in self._views if one.element_size() == size] for size in _INTEGERS]
        return b"".join(torch.cat(views).cpu().numpy().tobytes() for views in by_size if views)


_CANDIDATES = {"torch": "torch", "onnxruntime": "onnxruntime", "openvino": "openvino"}
"""Backend -> the module that it needs, without `compiled`, which takes longer to start than most work."""

_ROUNDS = 5

_VERSIONED_PACKAGES = ("deeplabzoo", "torch", "onnxruntime", "openvino")

_build_lock = threading.Lock()


@dataclass(frozen=True)
class EngineTime:
    """Time of one backend from tensor to labels; `milliseconds` is None, with the reason in `refused`, where it cannot run."""

    engine: str
    milliseconds: float | None
    """Median."""
    start_up_seconds: float
    refused: str | None = None


def measure_engines(
    net: DeepLab, size: tuple[int, int] | None = None, precision: str = "fp32", *, rounds: int = _ROUNDS
) -> list[EngineTime]:
    """Time every installed backend but `compiled` on one image, from tensor to labels, interleaved.

    Args:
        net: The model.
        size: (height, width) in pixels; default: that of the preprocessing.
        precision: fp32, bf16, fp16 or int8.
        rounds: Measurements per backend.

    Returns:
        Fastest first; backends that cannot run this model or precision come last, with the reason.
    """
    height, width = size or net.preprocessing.size
    image_BCHW = torch.randn(1, net.config.in_chans, height, width, generator=torch.Generator().manual_seed(0))
    image_BCHW = image_BCHW.to(net.device)
    ready: dict[str, tuple[OptimizedDeepLab, float]] = {}
    refused: list[EngineTime] = []
    for engine in _installed_engines(net):
        started = time.perf_counter()
        try:
            fast = optimize(net, engine, precision=precision)
            fast.predict_labels(image_BCHW)  # the first call packs, plans and fills caches
            fast.predict_labels(image_BCHW)
        except DeepLabZooError as error:
            refused.append(EngineTime(engine, None, time.perf_counter() - started, str(error)))
        else:
            ready[engine] = (fast, time.perf_counter() - started)
    times: dict[str, list[float]] = {engine: [] for engine in ready}
    for _ in range(rounds):
        for engine, (fast, _start_up) in ready.items():
            started = time.perf_counter()
            fast.predict_labels(image_BCHW).cpu()
            times[engine].append(1000 * (time.perf_counter() - started))
    measured = [EngineTime(engine, statistics.median(times[engine]), start_up) for engine, (_, start_up) in ready.items()]
    return sorted(measured, key=lambda one: one.milliseconds or 0.0) + refused


def fastest_engine(net: DeepLab, size: tuple[int, int] | None = None, precision: str = "fp32") -> str:
    """Return the fastest installed backend from the cache, or measure it and log the result.

    Raises:
        DeepLabZooError: No backend can run the model.
    """
    known = cached_engine(net, size, precision)
    if known is not None:
        return known
    table = measure_engines(net, size, precision)
    best = table[0] if table else None
    if best is None or best.milliseconds is None:
        reasons = " ".join(one.refused or "" for one in table)
        raise DeepLabZooError(f"No installed engine runs this model in {precision}: {reasons}")
    shown = ", ".join(f"{one.engine} {one.milliseconds:.0f} ms" for one in table if one.milliseconds is not None)
    height, width = size or net.preprocessing.size
    logger.info(f"engine auto: {best.engine} ({shown}; {precision}, {width} x {height}, {torch.get_num_threads()} threads)")
    row = {"engine": best.engine, "milliseconds": {one.engine: one.milliseconds for one in table}}
    content = (json.dumps(row, indent=2) + "\n").encode()
    path = _cache_file(net, size, precision)
    try:
        ensure_folder(path.parent)
        write_atomically(path, lambda file: file.write(content))
    except DeepLabZooError as error:
        logger.warning(f"engine auto: the result could not be cached ({error})")
    return best.engine


def cached_engine(net: DeepLab, size: tuple[int, int] | None = None, precision: str = "fp32") -> str | None:
    """Return the cached backend for this model, size, precision, thread count, versions and machine; None if not measured."""
    try:
        engine = json.loads(_cache_file(net, size, precision).read_text(encoding="utf-8"))["engine"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return engine if engine in _installed_engines(net) else None


def _installed_engines(net: DeepLab) -> list[str]:
    present = [engine for engine, module in _CANDIDATES.items() if importlib.util.find_spec(module) is not None]
    return present if net.device.type == "cpu" else ["torch"]


def _cache_file(net: DeepLab, size: tuple[int, int] | None, precision: str) -> Path:
    key: dict[str, Any] = {
        "config": net.config.to_dict(),
        "size": list(size or net.preprocessing.size),
        "precision": precision,
        "threads": torch.get_num_threads(),
        "device": str(net.device),
        "versions": {name: _version(name) for name in _VERSIONED_PACKAGES},
        "machine": [platform.node(), platform.machine(), platform.processor(), torch.backends.cpu.get_cpu_capability()],
    }
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    return cache_folder() / "engines" / f"{digest[:32]}.json"


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


class OptimizedModelCache:
    """The optimized form of a model, built at first use and rebuilt after the model changed; safe to use from threads.

    `auto` means the backend of an earlier measurement, else torch: it never measures on the first call. A model that cannot be
    optimized runs as it is.

    Args:
        net: The model.
        engine: Name of the backend, or `auto`.
        precision: fp32, bf16, fp16 or int8.
    """

    def __init__(self, net: DeepLab, engine: str, precision: str) -> None:
        self.net, self.precision = net, precision
        self.engine = engine
        self._made: OptimizedDeepLab | None = None
        self._logged = ""

    def __getstate__(self) -> dict[str, Any]:
        """Pickle without the optimized form, which is rebuilt in the other process."""
        return {**self.__dict__, "_made": None}

    def current(self) -> DeepLab | OptimizedDeepLab:
        """Return the optimized model of the current weights, or the model itself where it cannot be optimized."""
        made = self._made
        if made is not None and made.current:  # without the lock: a process forked now would inherit it, held
            return made
        if reason := unsupported_reason(self.net):
            if reason != self._logged:
                logger.warning(f"running the model without layer fusion, since {reason}")
                self._logged = reason
            return self.net
        with _build_lock:
            if self._made is None or not self._made.current:
                engine = self.engine
                if engine == "auto":
                    engine = cached_engine(self.net, None, self.precision) or "torch"
                self._made = build_optimized(self.net, engine, precision=self.precision)
            return self._made
