"""DeepLab's head recognised in a graph's layers: pyramid branches, their order, rates and resizing, and the classifier."""

from dataclasses import dataclass, replace

import numpy as np
import torch

from deeplabzoo.errors import WeightsError
from deeplabzoo.models.config import DeepLabConfig
from deeplabzoo.zoo.origins.tflite_layers import CONVOLUTION, DEPTHWISE, Layer
from deeplabzoo.zoo.origins.tflite_mobilenetv2 import StateDict, folded_pair, is_pointwise

POOLING = ("MEAN", "AVERAGE_POOL_2D")


@dataclass(frozen=True, eq=False)
class Head:
    """A DeepLabV3 head; a branch is one convolution, or a depthwise and a pointwise one."""

    feature: Layer
    branches: tuple[tuple[Layer, ...], ...]
    """The 1x1 branch, then the atrous ones in the file's order."""
    pool: Layer
    pooling_first: bool
    project: Layer
    """Its input channels are in our order: branches, and the pooled one before or after them."""
    refine: Layer | None
    classifier: Layer
    align_corners: bool
    notes: tuple[str, ...]

    @property
    def rates(self) -> tuple[int, ...]:
        """Dilation of each atrous branch."""
        return tuple(branch[0].dilation for branch in self.branches[1:])

    @property
    def separable(self) -> bool | None:
        """Whether the atrous branches are depthwise-separable; None if there are none."""
        return len(self.branches[1]) == 2 if self.rates else None

    @property
    def channels(self) -> int:
        """Width of every branch and of the projection."""
        return _outputs(self.project)

    @property
    def num_classes(self) -> int:
        """Number of logits per pixel."""
        return _outputs(self.classifier)


@dataclass(frozen=True, eq=False)
class _Branch:
    feature: Layer
    layers: tuple[Layer, ...]
    is_pool: bool = False


def read_head(output: Layer) -> Head | None:
    """Read the head behind the logits `output`, or return None if no layer joins branches (a classifier).

    Raises WeightsError, naming the layer, if a head is there that DeepLabV3 has not.
    """
    if not _joins_branches(output):
        return None
    resizes: list[Layer] = []
    classifier = _before_resizes(output, resizes)
    if not is_pointwise(classifier, ""):
        raise _unlike(classifier, "a linear 1x1 convolution to class scores")
    project, refine = classifier.sources[0], None
    if project.kind == CONVOLUTION and project.kernel == (3, 3):
        project, refine = project.sources[0], _keeping_size(project)
    if not is_pointwise(project, "RELU") or project.sources[0].kind != "CONCATENATION":
        raise _unlike(project, "a 1x1 convolution with RELU on the joined branches (decoders of DeepLabV3+ are not read)")
    branches = [_branch(source) for source in project.sources[0].sources]
    pooled = [index for index, branch in enumerate(branches) if branch.is_pool]
    pointwise = [index for index, branch in enumerate(branches) if not branch.is_pool and branch.layers[0].kernel == (1, 1)]
    atrous = [index for index in range(len(branches)) if index not in pooled + pointwise]
    if len(pooled) != 1 or len(pointwise) != 1 or any(branch.feature is not branches[0].feature for branch in branches):
        raise _unlike(project.sources[0], "one image pooling branch, one 1x1 branch and atrous ones on the same feature")
    widths = {_outputs(one) for one in (project, refine or project, *(branch.layers[-1] for branch in branches))}
    if len(widths) > 1 or len({len(branches[index].layers) for index in atrous}) > 1:
        raise _unlike(project.sources[0], "branches of one form and of the projection's width")
    pooling_first = pooled[0] == 0
    order = pooled + pointwise + atrous if pooling_first else pointwise + atrous + pooled
    align_corners, notes = _corners(resizes)
    return Head(
        feature=branches[0].feature,
        branches=tuple(branches[index].layers for index in pointwise + atrous),
        pool=branches[pooled[0]].layers[0],
        pooling_first=pooling_first,
        project=_reordered(project, order),
        refine=refine,
        classifier=classifier,
        align_corners=align_corners,
        notes=notes,
    )


def head_state(head: Head, config: DeepLabConfig, feature_channels: int) -> StateDict:
    """Return the head's weights under our names; `feature_channels` is the encoder's width, which may exceed the file's."""
    assert head.classifier.weight is not None
    assert head.classifier.bias is not None
    state: StateDict = {
        "head.classifier.weight": torch.from_numpy(np.ascontiguousarray(head.classifier.weight)),
        "head.classifier.bias": torch.from_numpy(np.array(head.classifier.bias)),
    }
    named = {"aspp.pool": head.pool, "aspp.project": head.project} | ({"refine": head.refine} if head.refine else {})
    for index, branch in enumerate(head.branches):
        parts = ("",) if len(branch) == 1 else (".depthwise", ".pointwise")
        named |= {f"aspp.branches.{index}{part}": layer for part, layer in zip(parts, branch, strict=True)}
    for name, layer in named.items():
        assert layer.weight is not None
        outputs, inputs, *kernel = layer.weight.shape
        if name.endswith(".depthwise"):
            outputs = feature_channels
        elif name.endswith(".pointwise") or name.startswith(("aspp.branches", "aspp.pool")):
            inputs = feature_channels
        shape = (outputs, inputs, *kernel)
        state |= folded_pair(layer, shape, f"head.{name}.conv", f"head.{name}.norm", config.norm_eps)
    return state


def _branch(layer: Layer) -> _Branch:
    layer = _before_resizes(layer, [])
    if layer.kind == CONVOLUTION and layer.kernel == (3, 3):
        return _Branch(layer.sources[0], (_keeping_size(layer),))
    if not is_pointwise(layer, "RELU"):
        raise _unlike(layer, "a branch that ends in a 1x1 or 3x3 convolution with RELU")
    source = layer.sources[0]
    if source.kind in POOLING:
        if any(side != 1 for side in source.shape[1:-1]):
            raise _unlike(source, "a mean over the whole map")
        return _Branch(source.sources[0], (layer,), is_pool=True)
    if source.kind == DEPTHWISE and source.activation == "RELU":
        return _Branch(source.sources[0], (_keeping_size(source), layer))
    return _Branch(source, (layer,))


def _keeping_size(layer: Layer) -> Layer:
    reach = layer.dilation * (layer.kernel[0] // 2)
    if layer.kernel != (3, 3) or layer.activation != "RELU" or layer.stride != 1 or layer.padding != 4 * (reach,):
        raise _unlike(layer, "a 3x3 convolution with RELU that keeps the map's size")
    return layer


def _reordered(project: Layer, order: list[int]) -> Layer:
    assert project.weight is not None
    outputs, inputs = project.weight.shape[:2]
    if inputs != len(order) * outputs:
        raise _unlike(project, f"{len(order) * outputs} input channels")
    weight = project.weight.reshape(outputs, len(order), outputs, 1, 1)[:, order].reshape(project.weight.shape)
    return replace(project, weight=np.ascontiguousarray(weight))


def _before_resizes(layer: Layer, resizes: list[Layer]) -> Layer:
    while layer.kind == "RESIZE_BILINEAR":
        resizes.append(layer)
        layer = layer.sources[0]
    return layer


def _corners(resizes: list[Layer]) -> tuple[bool, tuple[str, ...]]:
    """Return align_corners of the logits' upsampling, and what had to be assumed about it."""
    working = [resize for resize in resizes if resize.shape[1:3] != resize.sources[0].shape[1:3]]
    if not working:
        return True, ("the file's logits are not upsampled: align_corners assumed, as TensorFlow's DeepLab does",)
    modes = {(resize.align_corners, resize.half_pixel_centers) for resize in working}
    if len(working) > 1:
        return working[0].align_corners, ("the file upsamples its logits in several steps, here it is one",)
    if modes == {(False, False)}:
        return False, ("the file upsamples its logits from pixel corners, here from pixel centres: up to half a pixel apart",)
    return working[0].align_corners, ()


def _joins_branches(output: Layer) -> bool:
    seen: set[int] = set()
    waiting = [output]
    while waiting:
        layer = waiting.pop()
        if layer.kind == "CONCATENATION":
            return True
        fresh = [source for source in layer.sources if id(source) not in seen]
        seen |= {id(source) for source in fresh}
        waiting += fresh
    return False


def _outputs(layer: Layer) -> int:
    assert layer.weight is not None
    return int(layer.weight.shape[0])


def _unlike(layer: Layer, expected: str) -> WeightsError:
    return WeightsError(f"This is not a DeepLabV3 head: {layer} stands where {expected} was expected.")
