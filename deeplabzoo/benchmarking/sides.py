"""The sides of a comparison, opened by a short name: `torch:fp32` and the like for ours, a library's name for a peer."""

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from deeplabzoo.benchmarking.libraries import counterpart, library, natural_counterpart
from deeplabzoo.benchmarking.runtimes import RUNTIMES, write_onnx
from deeplabzoo.errors import UnknownNameError, UsageError, did_you_mean
from deeplabzoo.inference.engine import ENGINES, PRECISIONS, optimize
from deeplabzoo.models.deeplab import DeepLab
from deeplabzoo.zoo.exporting import LIBRARIES

Task = Literal["labels", "logits"]
TASKS: dict[Task, str] = {"labels": "image -> labels", "logits": "image -> logits"}
OURS = "deeplabzoo"
PEERS = (*LIBRARIES, *RUNTIMES, OURS)
"""Whom `--peers` can name; `deeplabzoo` is our own network as it was loaded, in float32, before `optimize()`."""
LIBRARY_OF = {peer: peer for peer in (*LIBRARIES, *RUNTIMES)} | {"smp": "segmentation_models_pytorch"}
"""The module that each peer but ourselves needs."""
PLAIN = "plain"
"""The engine that is none: the network as it was loaded."""
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Side:
    """One way to run a network; both take a float32 image_BCHW on the device of the benchmark."""

    title: str
    """As tables call it."""
    labels: Callable[[torch.Tensor], Any]
    """image_BCHW -> labels_BHW, integers, a tensor or an array."""
    logits: Callable[[torch.Tensor], Any]
    """image_BCHW -> logits B x num_classes x H x W at the image's size."""

    def call(self, task: Task, image_BCHW: torch.Tensor) -> Callable[[], Any]:
        """Return the task as a function of nothing, for a stopwatch."""
        function = getattr(self, task)
        return lambda: function(image_BCHW)


def open_side(
    name: str,
    net: DeepLab,
    image_BCHW: torch.Tensor,
    *,
    threads: int,
    peer_precision: str = "fp32",
    calibration: str | None = None,
) -> Side:
    """Open a side by its name for images of one shape; raises UsageError where it cannot be had here.

    `ENGINE:PRECISION` is ours (`plain:fp32` is the network as loaded); else one of PEERS.
    """
    if ":" in name:
        engine, precision = name.split(":")
        return _ours(net, engine, precision, image_BCHW, calibration)
    require_peer(name)
    if name in RUNTIMES:
        return _runtime(name, net, image_BCHW, threads)
    if name == OURS:
        return _torch_side("deeplabzoo, as loaded", net.to(image_BCHW.device), net.predict_labels, contextlib.nullcontext)
    theirs = counterpart(net, name).to(image_BCHW.device)

    def labels(image_BCHW: torch.Tensor) -> torch.Tensor:
        logits_BCHW: torch.Tensor = theirs(image_BCHW)
        return logits_BCHW.argmax(1)

    version = "" if peer_precision == "fp32" else f", autocast {peer_precision}"
    return _torch_side(f"{name}, eager{version}", theirs, labels, _autocast(peer_precision, image_BCHW.device))


def require_ours(name: str) -> None:
    """Raise UnknownNameError, or UsageError, for an `ENGINE:PRECISION` that is none of ours."""
    engine, _, precision = name.partition(":")
    for what, value, known in (("engine", engine, (PLAIN, *ENGINES, "auto")), ("precision", precision, PRECISIONS)):
        if value not in known:
            raise UnknownNameError(f"Unknown {what} {value!r}; expected of {', '.join(known)}.{did_you_mean(value, known)}")
    if engine == PLAIN and precision != "fp32":
        raise UsageError(f"The engine 'plain' is the network as it was loaded, in fp32; it has no {precision}.")


def require_peer(name: str) -> None:
    """Raise UnknownNameError, with the nearest name, for a peer that this benchmark does not know."""
    if name not in PEERS:
        raise UnknownNameError(f"Unknown peer {name!r}; expected of {', '.join(PEERS)}.{did_you_mean(name, PEERS)}")


def _ours(net: DeepLab, engine: str, precision: str, image_BCHW: torch.Tensor, calibration: str | None) -> Side:
    net.to(image_BCHW.device)
    if engine == PLAIN:
        return _torch_side("plain fp32", net, net.predict_labels, contextlib.nullcontext)
    height, width = image_BCHW.shape[-2:]
    fast = optimize(net, engine, precision=precision, size=(height, width), calibration=calibration)
    return _torch_side(f"{fast.engine} {precision}", fast, fast.predict_labels, contextlib.nullcontext)


def _torch_side(
    title: str,
    logits: Callable[[torch.Tensor], Any],
    labels: Callable[[torch.Tensor], Any],
    context: Callable[[], AbstractContextManager[Any]],
) -> Side:
    """Wrap both in inference mode and the context given."""

    def inside(function: Callable[[torch.Tensor], Any]) -> Callable[[torch.Tensor], Any]:
        def run(image_BCHW: torch.Tensor) -> Any:
            with torch.inference_mode(), context():
                return function(image_BCHW)

        return run

    return Side(title, inside(labels), inside(logits))


def _autocast(precision: str, device: torch.device) -> Callable[[], AbstractContextManager[Any]]:
    if precision == "fp32":
        return contextlib.nullcontext
    if precision not in _DTYPES:
        raise UsageError(f"Peers run in {', '.join(_DTYPES)}, not in {precision!r}.")
    return lambda: torch.autocast(device.type, _DTYPES[precision])


def require_size(name: str, net: DeepLab, size: tuple[int, int]) -> None:
    """Raise UsageError where a peer does not take pictures of this height and width."""
    height, width = size
    stride = max(net.output_stride, 16) if net.config.architecture == "deeplabv3plus" else net.output_stride
    of_smp = name == "smp" or (name in RUNTIMES and natural_counterpart(net)[0] == "smp")
    if of_smp and (height % stride or width % stride):
        near = [max(stride, stride * round(side / stride)) for side in (height, width)]
        raise UsageError(
            f"SMP takes only sizes that {stride} divides, not {height} x {width}; measure with --size {near[0]} {near[1]}."
        )


def _runtime(name: str, net: DeepLab, image_BCHW: torch.Tensor, threads: int) -> Side:
    if image_BCHW.device.type != "cpu":
        raise UsageError(f"{name} is measured on the CPU alone; leave it out of --peers with --device {image_BCHW.device}.")
    library(name)
    origin, theirs = natural_counterpart(net)
    with _onnx_file() as path:
        write_onnx(theirs, image_BCHW, path)
        run = RUNTIMES[name](path, threads)

    def logits(image_BCHW: torch.Tensor) -> Any:
        return run(image_BCHW.numpy())

    def labels(image_BCHW: torch.Tensor) -> Any:
        return run(image_BCHW.numpy()).argmax(axis=1)

    return Side(f"{name} fp32, {origin}'s network", labels, logits)


@contextlib.contextmanager
def _onnx_file() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="deeplabzoo-benchmark-") as place:
        yield Path(place) / "theirs.onnx"
