"""Choice of the device that a model runs on, and a context manager that puts a model into eval mode for a block."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from deeplabzoo.errors import UsageError
from deeplabzoo.log import logger


class HasDevice(Protocol):
    """An optimized model, which is no nn.Module."""

    @property
    def device(self) -> torch.device:
        """Device of the input."""
        ...


def choose_device(device: str | torch.device, net: torch.nn.Module | None = None) -> torch.device:
    """Return the torch device to run on; the choice for "auto" is logged.

    Args:
        device: A torch device, or "auto": the accelerator that `net` is on, else CUDA, Apple's MPS or the CPU in this order.
        net: Model to run.

    Raises:
        UsageError: This machine does not have the device.
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
        raise UsageError(
            f"The device {str(device)!r} cannot be used ({reason}); available devices: {', '.join(present)}."
        ) from None
    if chosen.type == "meta":
        raise UsageError("The device 'meta' holds no values and cannot run a model; use 'auto' or 'cpu'.")
    return chosen


def without_wrappers(model: Any) -> Any:
    """Return the module inside DataParallel, DistributedDataParallel, AveragedModel or torch.compile's wrapper.

    Args:
        model: Anything; what is no such wrapper is returned as it is.
    """
    while isinstance(model, torch.nn.Module):
        # attributes of torch.compile's wrapper are those of the model inside, so the submodules decide
        inner = next((model._modules[name] for name in ("_orig_mod", "module") if model._modules.get(name) is not None), None)
        if inner is None:
            break
        model = inner
    return model


def device_of(net: torch.nn.Module | HasDevice) -> torch.device:
    """Return the device that a model takes its input on."""
    return next(net.parameters()).device if isinstance(net, torch.nn.Module) else net.device


@dataclass
class _EvalModeState:
    """The training flags of a model that runs in eval mode, and the number of `eval_mode` blocks that it is in."""

    flags: list[tuple[torch.nn.Module, bool]]
    """Module and the flag that it had before."""
    blocks: int = 0


_eval_mode_lock = threading.RLock()  # reentrant: garbage collection may end an abandoned block while this thread holds the lock
_eval_mode_states: dict[torch.nn.Module, _EvalModeState] = {}


@contextmanager
def eval_mode(net: torch.nn.Module | HasDevice) -> Iterator[None]:
    """Put a model into eval mode and torch into inference mode for a block; training flags are restored afterwards.

    Blocks of several threads may overlap: the last one that ends restores the flags.
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
