"""The inference form compiled by torch's Inductor with its weights frozen in: for many pictures of few sizes.

Compiling takes a C++ compiler and, in each process, from half a minute to minutes: Inductor keeps kernels in its cache on disk,
but no graph that holds weights. A second size is compiled once more, with sizes left open, and said.
"""

import threading
import time
from collections.abc import Callable

import torch
import torch._inductor.config as inductor

from deeplabzoo.errors import DeepLabZooError
from deeplabzoo.log import logger
from deeplabzoo.models.deeplab import DeepLab
from deeplabzoo.optimization.backends.torch_backend import require_precision, wrap_forward
from deeplabzoo.optimization.fused_model import FusedModel, build_fused_model


def build(
    net: DeepLab, precision: str = "fp32", *, size: tuple[int, int] | None = None
) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return what `torch_engine.build` does, compiled for one image of `size` (default: the weights' own) before it returns.

    Raises UsageError as that does, and DeepLabZooError where the compiler fails, now or at a new size, with its first line.
    """
    started = time.perf_counter()
    device = next(net.parameters()).device
    dtype = require_precision("compiled", precision, device)
    with torch.inference_mode():
        form = build_fused_model(net).to(dtype)
    forward = wrap_forward(_compile_frozen(form), device, dtype)
    height, width = size or net.preprocessing.size
    _compile_now(forward, torch.zeros(1, net.config.in_chans, height, width))
    logger.info(f"engine compiled, {precision}: ready for {width} x {height} after {time.perf_counter() - started:.0f} s")
    seen = {(1, height, width)}

    def saying(image_BCHW: torch.Tensor) -> torch.Tensor:
        batch, _, *sides = image_BCHW.shape
        if (batch, *sides) not in seen:
            if len(seen) == 1:
                logger.info(
                    f"engine compiled: {batch} x {sides[1]} x {sides[0]} is another size; compiling once more for any size."
                )
            low_BCHW = _compile_now(forward, image_BCHW)
            seen.add((batch, sides[0], sides[1]))
            return low_BCHW
        return forward(image_BCHW)

    return saying


def _compile_now(forward: Callable[[torch.Tensor], torch.Tensor], image_BCHW: torch.Tensor) -> torch.Tensor:
    try:
        return forward(image_BCHW)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # the compiler stack raises errors of many kinds
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".:")
        height, width = image_BCHW.shape[-2:]
        raise DeepLabZooError(
            f"The network could not be compiled for {width} x {height} ({reason}); use engine='torch'."
        ) from error


def _compile_frozen(form: FusedModel) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return the form compiled, at its calls, with its weights as constants, which lets Inductor pack them for oneDNN.

    The switch is Inductor's own, not an option of `torch.compile`: dynamo reads it while it traces, before options hold.
    """
    compiled = torch.compile(form)
    turn = threading.Lock()  # the switch is one for all threads: who leaves first would turn it off for who compiles

    def forward(image_BCHW: torch.Tensor) -> torch.Tensor:
        with turn, inductor.patch(freezing=True):
            logits: torch.Tensor = compiled(image_BCHW)
            return logits

    return forward
