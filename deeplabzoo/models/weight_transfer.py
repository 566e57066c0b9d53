"""Give a freshly built module the tensors of another: without drawing numbers first, and without copying Parameters."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from deeplabzoo.errors import WeightsError
from deeplabzoo.models.config import DeepLabConfig


class SkipInit(TorchFunctionMode):
    """While this holds, random initialisation is skipped: every tensor is about to be replaced, so drawing is lost time."""

    _RANDOM_FILLS = frozenset({torch.Tensor.uniform_, torch.Tensor.normal_, torch.Tensor.erfinv_})

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Return the tensor as it is where it would be filled: by a function of torch.nn.init, or by a draw."""
        if func in self._RANDOM_FILLS or getattr(func, "__module__", "") == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def has_non_state_tensors(module: nn.Module) -> bool:
    """Whether a module has tensors that no state dict can give it: buffers outside it, or plain attributes."""
    in_state = set(module.state_dict())
    if any(name not in in_state for name, _ in module.named_buffers()):
        return True
    return any(isinstance(value, torch.Tensor) for part in module.modules() for value in vars(part).values())


def assign_state_dict(net: nn.Module, state_dict: Mapping[str, torch.Tensor]) -> None:
    """Make the tensors of `state_dict` those of `net`, without a copy where dtype and layout are right and none is shared.

    Names and shapes have been found to fit. Parameters keep their requires_grad.
    """
    taken: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for name, like in net.state_dict().items():
        tensor = state_dict[name].detach().to("cpu", like.dtype).contiguous()
        if tensor.data_ptr() in seen:  # two names for one tensor would be trained as one
            tensor = tensor.clone()
        seen.add(tensor.data_ptr())
        taken[name] = tensor
    net.load_state_dict(taken, assign=True)


def transfer_tensors(new: nn.Module, old: nn.Module) -> None:
    """Put the very Parameter and buffer objects of `old` into `new`, and the state that is not in tensors.

    Both have the same tensor names and shapes; training flags, requires_grad and the momentum of batch norms come along.
    """
    frozen = [parameter for parameter in old.parameters() if not parameter.requires_grad]
    try:
        new.load_state_dict(old.state_dict(keep_vars=True), assign=True)
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)  # assigning gave it the flag of the parameter that it replaced
    old_modules, old_buffers = dict(old.named_modules()), dict(old.named_buffers())
    for name, module in new.named_modules():
        before = old_modules.get(name)
        module.training = old.training if before is None else before.training
        if isinstance(module, nn.BatchNorm2d) and isinstance(before, nn.BatchNorm2d):
            module.momentum, module.eps = before.momentum, before.eps
    like = next(old.parameters())
    for name, buffer in list(new.named_buffers()):  # those outside the state dict, such as blur kernels
        owner, _, attribute = name.rpartition(".")
        moved = buffer.to(like.device, like.dtype) if buffer.is_floating_point() else buffer.to(like.device)
        setattr(new.get_submodule(owner), attribute, old_buffers.get(name, moved))


def check_state_dict(config: DeepLabConfig, state_dict: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Size]) -> None:
    """Raise WeightsError unless `state_dict` has exactly the tensors and shapes of the network that `config` describes."""
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
    network = f"{config.architecture} on {config.encoder} with {config.num_classes} classes"
    architecture = "deeplabv3plus" if "head.low_level.conv.weight" in state_dict else "deeplabv3"
    mixed_up = f" These are the weights of a {architecture}." if architecture != config.architecture else ""
    raise WeightsError(f"The weights do not fit {network}: {', '.join(problems)}.{mixed_up}")
