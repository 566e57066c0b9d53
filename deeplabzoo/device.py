"""Where a network runs, and in which state: the device choice, said aloud, and eval mode that is given back."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from deeplabzoo.errors import UsageError
from deeplabzoo.log import logger

if TYPE_CHECKING:
    from deeplabzoo.optimization.optimized_model import OptimizedDeepLab


def choose_device(device: str | torch.device, net: torch.nn.Module | None = None) -> torch.device:
    """Return the torch device for `device`; "auto" leaves `net` on the accelerator it is on, or else takes the best there is.

    Order for "auto": CUDA, Apple's MPS, CPU; the choice is said in one line. Raises UsageError for a device that this machine
    does not have.
    """
    if device != "auto":
        return _validated_device(device)
    here = next((parameter.device for parameter in net.parameters()), None) if net is not None else None
    if here is not None and here.type not in ("cpu", "meta"):
        return here
    if torch.cuda.is_available():
        chosen = torch.device("cuda")
        logger.info(f"device: cuda ({torch.cuda.get_device_name(chosen)})")
    elif torch.backends.mps.is_available():
        chosen = torch.device("mps")
        logger.info("device: mps (Apple GPU)")
    else:
        chosen = torch.device("cpu")
        threads = torch.get_num_threads()
        logger.info(f"device: cpu ({threads} thread{'s' if threads != 1 else ''}; no GPU found)")
    return chosen


def _validated_device(device: str | torch.device) -> torch.device:
    try:
        chosen = torch.device(device)
        torch.empty(1, device=chosen)
    except (RuntimeError, AssertionError, ValueError) as error:
        reason = str(error).strip().split("\n")[0].rstrip(".")
        present = ["auto", "cpu", *(["cuda"] if torch.cuda.is_available() else [])]
        present += ["mps"] if torch.backends.mps.is_available() else []
        raise UsageError(f"The device {str(device)!r} cannot be used ({reason}); here are {', '.join(present)}.") from None
    if chosen.type == "meta":
        raise UsageError("The device 'meta' holds no values and cannot run a network; use 'auto' or 'cpu'.")
    return chosen


def device_of(net: "torch.nn.Module | OptimizedDeepLab") -> torch.device:
    """Return where a network takes its input: an optimised one knows, another has its tensors there."""
    return next(net.parameters()).device if isinstance(net, torch.nn.Module) else net.device


@dataclass
class _EvalModeState:
    """The training flags of a network that runs in eval mode, and how many blocks still need it so."""

    flags: list[tuple[torch.nn.Module, bool]]
    blocks: int = 0


_eval_mode_lock = threading.RLock()  # not a plain lock: garbage collection may end a forgotten block inside of it
_eval_mode_states: dict[torch.nn.Module, _EvalModeState] = {}


@contextmanager
def eval_mode(net: "torch.nn.Module | OptimizedDeepLab") -> Iterator[None]:
    """Eval mode and inference mode inside the block; afterwards every module has the training flag that it had before.

    Blocks of several threads may overlap: the last that ends gives the flags back.
    """
    if not isinstance(net, torch.nn.Module):
        with torch.inference_mode():
            yield
        return
    _enter_eval_mode(net)
    try:
        with torch.inference_mode():
            yield
    finally:
        _leave_eval_mode(net)


def _enter_eval_mode(net: torch.nn.Module) -> None:
    with _eval_mode_lock:
        borrowed = _eval_mode_states.get(net) or _EvalModeState([(module, module.training) for module in net.modules()])
        borrowed.blocks += 1
        _eval_mode_states[net] = borrowed
        for module in net.modules():
            module.training = False


def _leave_eval_mode(net: torch.nn.Module) -> None:
    with _eval_mode_lock:
        _eval_mode_states[net].blocks -= 1
        if _eval_mode_states[net].blocks:
            return
        for module, training in _eval_mode_states.pop(net).flags:
            module.training = training
