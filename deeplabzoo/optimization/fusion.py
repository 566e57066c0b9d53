"""Layer fusion: fold batch norms and activations into the convolutions before them, in any encoder.

Which layers can be folded is found by tracing one forward pass on a small image, not from names. A batch norm is folded if it
reads exactly the tensor that a convolution wrote and nothing else reads that tensor; likewise the activation after it. Each
fold is then checked on the recorded input of the convolution, and skipped if the output differs.
"""

import copy
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from deeplabzoo.log import logger
from deeplabzoo.optimization.fused_conv import BATCH_NORMS, PADDINGS, fold_batchnorm, get_activation

_TOLERANCE = 1e-4
"""Largest accepted difference between folded and original layers, relative to the largest value; rounding is far below it."""


def copy_sharing_tensors(module: nn.Module) -> nn.Module:
    """Return a copy of a module, in eval mode, that shares parameters and buffers with the original."""
    # a memo that maps each tensor to itself makes deepcopy keep it instead of copying it
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return copy.deepcopy(module, {id(tensor): tensor for tensor in tensors.values()}).eval()


def fold_batchnorms(encoder: nn.Module, image_BCHW: torch.Tensor) -> None:
    """Fold batch norms and activations into the convolutions of an encoder, in place; log the batch norms that remain.

    Args:
        encoder: In eval mode; a copy made by `copy_sharing_tensors`.
        image_BCHW: A small normalized image.
    """
    for module in encoder.modules():
        if getattr(module, "inplace", False):
            # in place, the output is the same tensor as the input, so its readers would count as readers of the input
            module.inplace = False  # type: ignore[assignment]
    trace = _ForwardTrace(encoder)
    with torch.no_grad(), trace.recording():
        trace.outputs = _tensors(encoder(image_BCHW))
    for name, conv in trace.convolutions.items():
        norm = trace.sole_consumer(name, BATCH_NORMS)
        last = norm or name
        activation = None
        norm_act = getattr(encoder.get_submodule(norm), "act", None) if norm else None
        if isinstance(norm_act, nn.Module) and not isinstance(norm_act, nn.Identity):
            activation = get_activation(norm_act)
        elif act := trace.sole_consumer(last, (nn.Module,)):
            activation = get_activation(encoder.get_submodule(act))
            last = act if activation else last
        if last == name:
            continue
        layer = encoder.get_submodule(norm) if norm else None
        fused = fold_batchnorm(conv, layer if isinstance(layer, nn.BatchNorm2d) else None, activation)
        unfused = norm_act if activation is None and isinstance(norm_act, nn.Module) else nn.Identity()
        with torch.no_grad():
            output = unfused(fused(trace.values[name][0]))
        if not _is_close(output, trace.values[last][1]):
            continue
        encoder.set_submodule(name, fused)
        for replaced in {norm, last} - {None, name}:
            assert replaced is not None
            encoder.set_submodule(replaced, unfused if replaced == norm else nn.Identity())
    _log_unfolded(encoder)


def convert_unfolded_convs(module: nn.Module) -> None:
    """Replace the convolutions without batch norm or activation by FusedConvs too, so that `onednn.prepack` can pack them."""
    for name, conv in list(module.named_modules()):
        if (
            type(conv) in PADDINGS
            and isinstance(conv, nn.Conv2d)
            and not _has_forward_hooks(conv)
            and conv.padding_mode == "zeros"
        ):
            module.set_submodule(name, fold_batchnorm(conv, None, None))


class _ForwardTrace:
    """Record of one forward pass: which layer wrote which tensor, and how often each tensor was read."""

    def __init__(self, encoder: nn.Module) -> None:
        names = Counter(id(module) for _, module in encoder.named_modules(remove_duplicate=False))
        leaves = {
            name: one for name, one in encoder.named_modules() if name and names[id(one)] == 1 and not _has_forward_hooks(one)
        }
        traced_types = (*PADDINGS, *BATCH_NORMS)
        self.modules = {name: one for name, one in leaves.items() if type(one) in traced_types or get_activation(one)}
        self.inputs_seen: dict[str, torch.Tensor] = {}
        self.written: dict[str, torch.Tensor] = {}
        self.values: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        """Copies of input and output: later operations may write in place."""
        self.calls: Counter[str] = Counter()
        self.reads = _ReadCounter()
        self.outputs: list[torch.Tensor] = []

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record inputs and outputs of the layers, and count the readers of every tensor."""

        def record(name: str) -> Any:
            def hook(_: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
                self.inputs_seen[name], self.written[name] = inputs[0], output
                self.calls[name] += 1
                with self.reads.paused():
                    self.values[name] = (inputs[0].clone(), output.clone())

            return hook

        hooks = [module.register_forward_hook(record(name)) for name, module in self.modules.items()]
        try:
            with self.reads:
                yield
        finally:
            for hook in hooks:
                hook.remove()

    @property
    def convolutions(self) -> Mapping[str, nn.Conv2d]:
        """The zero-padded convolutions that ran exactly once."""
        return {
            name: module
            for name, module in self.modules.items()
            if isinstance(module, nn.Conv2d) and self.calls[name] == 1 and module.padding_mode == "zeros"
        }

    def sole_consumer(self, writer: str, kinds: Sequence[type[nn.Module]]) -> str | None:
        """Return the name of the layer that alone read the output of `writer`, if its type is one of `kinds`; None otherwise.

        `nn.Module` among `kinds` stands for every known activation.
        """
        tensor = self.written[writer]
        if self.reads.count[id(tensor)] != 1 or any(tensor is output for output in self.outputs):
            return None
        readers = [name for name, inputs_seen in self.inputs_seen.items() if inputs_seen is tensor and name != writer]
        if len(readers) != 1 or self.calls[readers[0]] != 1:
            return None
        module = self.modules[readers[0]]
        wanted = type(module) in kinds if nn.Module not in kinds else get_activation(module) is not None
        return readers[0] if wanted and not _is_unfoldable(module) else None


class _ReadCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the operations that read each tensor (by id), and keeps all tensors alive so that no id is reused.

    TorchDispatchMode lives in a private module of torch (torch.utils._python_dispatch, since 1.13), but torch documents it as
    its extension point for this; forward hooks do not see operations outside of layers, such as a residual addition.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count: Counter[int] = Counter()
        self.alive: list[Any] = []
        self.counting = True

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Do not count reads inside this context: those of the recording itself."""
        self.counting = False
        try:
            yield
        finally:
            self.counting = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = {id(tensor): tensor for tensor in _tensors((args, kwargs or {}))}
        if self.counting:
            self.count.update(inputs.keys())
        result = func(*args, **(kwargs or {}))
        self.alive.append((inputs, result))
        return result


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = list(value.values())
    return [tensor for one in value for tensor in _tensors(one)] if isinstance(value, list | tuple) else []


def _has_forward_hooks(module: nn.Module) -> bool:
    """Whether a module has forward hooks: timm collects the features of some encoders by hooks."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _is_unfoldable(norm: nn.Module) -> bool:
    """Whether a batch norm has no running statistics, or is followed by dropout or DropBlock inside its layer."""
    drop = getattr(norm, "drop", None)
    without = isinstance(norm, nn.BatchNorm2d) and norm.running_mean is None
    return without or not (drop is None or isinstance(drop, nn.Identity))


def _is_close(one: torch.Tensor, other: torch.Tensor) -> bool:
    scale = float(other.abs().amax()) or 1.0
    return one.shape == other.shape and float((one - other).abs().amax()) <= _TOLERANCE * scale


def _log_unfolded(encoder: nn.Module) -> None:
    stays = Counter(type(module).__name__ for module in encoder.modules() if isinstance(module, nn.modules.batchnorm._NormBase))
    if stays:
        kinds = ", ".join(f"{count} {kind}" for kind, count in stays.items())
        logger.info(f"layer fusion: {kinds} in the encoder could not be folded and run as separate layers")
