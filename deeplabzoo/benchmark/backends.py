"""Backends of a comparison by short name: BACKEND:PRECISION of ours, such as `torch:fp32`, or the name of a peer."""

import contextlib
import io
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from deeplabzoo.benchmark import OURS, PLAIN, Task, library, require_peer
from deeplabzoo.checkpoints.conversion import LIBRARIES, write_exported
from deeplabzoo.checkpoints.converters.torchvision import BUILDERS
from deeplabzoo.errors import UnknownNameError, UsageError, WeightsError, did_you_mean
from deeplabzoo.models.deeplab import DeepLab
from deeplabzoo.optimization.optimized_model import ENGINES, PRECISIONS, optimize

SMP_PREFIX = "smp:"


def counterpart(net: DeepLab, peer: str) -> nn.Module:
    """Return `net` as a model of torchvision, SMP or transformers: image_BCHW -> logits B x num_classes x H x W, eval mode.

    The tensors are those of `net`, under the library's names, loaded by its own loader without missing or unexpected keys.
    Raises UsageError if the library is missing or has no equivalent model.
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
        return _TorchvisionLogits(theirs).eval()
    with tempfile.TemporaryDirectory(prefix="deeplabzoo-benchmark-") as place:
        folder = Path(place) / "theirs"
        write_exported(exported, folder, peer)
        if peer == "smp":
            loaded: nn.Module = library("segmentation_models_pytorch").from_pretrained(str(folder))
            return loaded.eval()
        classes = library("transformers")
        (name,) = exported.settings["config.json"]["architectures"]
        return _TransformersLogits(getattr(classes, name).from_pretrained(str(folder)), net.config.align_corners).eval()


def default_counterpart(net: DeepLab) -> tuple[str, nn.Module]:
    """Return the first library with an equivalent model, and that model; ours if there is none."""
    for peer in LIBRARIES:
        try:
            return peer, counterpart(net, peer)
        except UsageError:
            continue
    return "deeplabzoo", net


def smp_network(name: str, num_classes: int) -> Any:
    """Return SMP's own DeepLab for `smp:deeplabv3plus_ENCODER` with its defaults and random weights.

    Raises UnknownNameError for another name, and UsageError if SMP is missing.
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


class _TorchvisionLogits(nn.Module):
    """Returns the main logits of the dictionary that torchvision's models return."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, image_BCHW: torch.Tensor) -> torch.Tensor:
        logits_BCHW: torch.Tensor = self.net(image_BCHW)["out"]
        return logits_BCHW


class _TransformersLogits(nn.Module):
    """Its networks stop at low resolution; upsampled as its image processors do, with corners where the weights want them."""

    def __init__(self, net: nn.Module, align_corners: bool) -> None:
        super().__init__()
        self.net, self.align_corners = net, align_corners

    def forward(self, image_BCHW: torch.Tensor) -> torch.Tensor:
        logits_BChw = self.net(image_BCHW).logits
        return nn.functional.interpolate(
            logits_BChw, size=image_BCHW.shape[-2:], mode="bilinear", align_corners=self.align_corners
        )


# ONNX Runtime and OpenVINO as their users run them: the peer's model exported with full-size logits, arg-max in numpy.
#
# Both get the number of threads, compute in float32 and flush denormals to zero.


Float32Array = npt.NDArray[np.float32]
Run = Callable[[Float32Array], Float32Array]


def write_onnx(net: nn.Module, image_BCHW: torch.Tensor, path: Path) -> None:
    """Export a model with torch's exporter for images of one shape; raises UsageError if onnxscript is missing."""
    library("onnxscript")
    exporters = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in exporters]
    for logger in exporters:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")  # the exporter's own deprecations, which are not the reader's business
            torch.onnx.export(
                net,
                (image_BCHW,),
                str(path),
                dynamo=True,
                input_names=["image"],
                output_names=["logits"],
                external_data=False,
                verbose=False,
            )
    finally:
        for logger, level in zip(exporters, levels, strict=True):
            logger.setLevel(level)


def onnxruntime_run(path: Path, threads: int) -> Run:
    """Return image_BCHW -> logits_BCHW by ONNX Runtime on the CPU with its default optimisations."""
    ort = library("onnxruntime")
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.set_denormal_as_zero", "1")
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def run(image_BCHW: Float32Array) -> Float32Array:
        logits_BCHW: Float32Array = session.run(None, {"image": image_BCHW})[0]
        return logits_BCHW

    return run


def openvino_run(path: Path, threads: int) -> Run:
    """Return image_BCHW -> logits_BCHW by OpenVINO on the CPU, for latency."""
    openvino = library("openvino")
    settings: dict[str, Any] = {
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": "f32",
        "PERFORMANCE_HINT": "LATENCY",
        "CPU_DENORMALS_OPTIMIZATION": True,
    }
    compiled = openvino.Core().compile_model(str(path), "CPU", settings)

    def run(image_BCHW: Float32Array) -> Float32Array:
        logits_BCHW: Float32Array = compiled(image_BCHW)[0]
        return logits_BCHW

    return run


RUNTIMES: dict[str, Callable[[Path, int], Run]] = {"onnxruntime": onnxruntime_run, "openvino": openvino_run}
"""By the name that `--peers` has for them."""


_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Backend:
    """One way to run a model; both functions take a float32 image_BCHW on the benchmark's device."""

    title: str
    """Name in tables."""
    labels: Callable[[torch.Tensor], Any]
    """image_BCHW -> labels_BHW, integers, a tensor or an array."""
    logits: Callable[[torch.Tensor], Any]
    """image_BCHW -> logits B x num_classes x H x W at the image's size."""

    def call(self, task: Task, image_BCHW: torch.Tensor) -> Callable[[], Any]:
        """Return the task as a function without arguments, for timing."""
        function = getattr(self, task)
        return lambda: function(image_BCHW)


def open_backend(
    name: str,
    net: DeepLab,
    image_BCHW: torch.Tensor,
    *,
    threads: int,
    peer_precision: str = "fp32",
    calibration: str | None = None,
) -> Backend:
    """Open a backend for images of one shape; raises UsageError if it is not available.

    `BACKEND:PRECISION` is ours (`plain:fp32` is the model as loaded); any other name is one of PEERS.
    """
    if ":" in name:
        engine, precision = name.split(":")
        return _own_backend(net, engine, precision, image_BCHW, calibration)
    require_peer(name)
    if name in RUNTIMES:
        return _runtime(name, net, image_BCHW, threads)
    if name == OURS:
        return _torch_backend("deeplabzoo, as loaded", net.to(image_BCHW.device), net.predict_labels, contextlib.nullcontext)
    theirs = counterpart(net, name).to(image_BCHW.device)

    def labels(image_BCHW: torch.Tensor) -> torch.Tensor:
        logits_BCHW: torch.Tensor = theirs(image_BCHW)
        return logits_BCHW.argmax(1)

    version = "" if peer_precision == "fp32" else f", autocast {peer_precision}"
    return _torch_backend(f"{name}, eager{version}", theirs, labels, _autocast(peer_precision, image_BCHW.device))


def require_own_backend(name: str) -> None:
    """Raise UnknownNameError or UsageError for an invalid `BACKEND:PRECISION`."""
    engine, _, precision = name.partition(":")
    for what, value, known in (("backend", engine, (PLAIN, *ENGINES, "auto")), ("precision", precision, PRECISIONS)):
        if value not in known:
            raise UnknownNameError(f"Unknown {what} {value!r}; expected one of {', '.join(known)}.{did_you_mean(value, known)}")
    if engine == PLAIN and precision != "fp32":
        raise UsageError(f"The backend 'plain' is the model as it was loaded, in fp32; it has no {precision}.")


def _own_backend(net: DeepLab, engine: str, precision: str, image_BCHW: torch.Tensor, calibration: str | None) -> Backend:
    net.to(image_BCHW.device)
    if engine == PLAIN:
        return _torch_backend("plain fp32", net, net.predict_labels, contextlib.nullcontext)
    height, width = image_BCHW.shape[-2:]
    fast = optimize(net, engine, precision=precision, size=(height, width), calibration=calibration)
    return _torch_backend(f"{fast.engine} {precision}", fast, fast.predict_labels, contextlib.nullcontext)


def _torch_backend(
    title: str,
    logits: Callable[[torch.Tensor], Any],
    labels: Callable[[torch.Tensor], Any],
    context: Callable[[], AbstractContextManager[Any]],
) -> Backend:
    """Wrap both in inference mode and the context given."""

    def inside(function: Callable[[torch.Tensor], Any]) -> Callable[[torch.Tensor], Any]:
        def run(image_BCHW: torch.Tensor) -> Any:
            with torch.inference_mode(), context():
                return function(image_BCHW)

        return run

    return Backend(title, inside(labels), inside(logits))


def _autocast(precision: str, device: torch.device) -> Callable[[], AbstractContextManager[Any]]:
    if precision == "fp32":
        return contextlib.nullcontext
    if precision not in _DTYPES:
        raise UsageError(f"Peers run in {', '.join(_DTYPES)}, not in {precision!r}.")
    return lambda: torch.autocast(device.type, _DTYPES[precision])


def require_size(name: str, net: DeepLab, size: tuple[int, int]) -> None:
    """Raise UsageError if a peer does not accept images of this height and width."""
    height, width = size
    stride = max(net.output_stride, 16) if net.config.architecture == "deeplabv3plus" else net.output_stride
    of_smp = name == "smp" or (name in RUNTIMES and default_counterpart(net)[0] == "smp")
    if of_smp and (height % stride or width % stride):
        near = [max(stride, stride * round(side / stride)) for side in (height, width)]
        raise UsageError(
            f"SMP takes only sizes that {stride} divides, not {height} x {width}; measure with --size {near[0]} {near[1]}."
        )


def _runtime(name: str, net: DeepLab, image_BCHW: torch.Tensor, threads: int) -> Backend:
    if image_BCHW.device.type != "cpu":
        raise UsageError(f"{name} is measured on the CPU only; omit it from --peers with --device {image_BCHW.device}.")
    library(name)
    origin, theirs = default_counterpart(net)
    with _onnx_file() as path:
        write_onnx(theirs, image_BCHW, path)
        run = RUNTIMES[name](path, threads)

    def logits(image_BCHW: torch.Tensor) -> Any:
        return run(image_BCHW.numpy())

    def labels(image_BCHW: torch.Tensor) -> Any:
        return run(image_BCHW.numpy()).argmax(axis=1)

    return Backend(f"{name} fp32, {origin}'s model", labels, logits)


@contextlib.contextmanager
def _onnx_file() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="deeplabzoo-benchmark-") as place:
        yield Path(place) / "theirs.onnx"
