"""TensorFlow Lite files of MobileNetV2: DeepLab segmentation models, and classifiers as encoders for new ones.

Everything is read off the graph: the blocks and their dilations, the head's branches and their order, how maps are resized,
the input's scaling and the number of classes. Weights may be float32, float16, 8-bit per tensor or per channel, with or without
a final ARG_MAX or SOFTMAX. A float file does not say how its input is scaled; [-1, 1], TensorFlow's convention for MobileNetV2,
is assumed and logged. Class names come from a label list attached to the file, or are VOC's for 21 classes, or `class_0` and
so on.

What is left behind by quantisation cannot be recovered: activations were rounded (and cut off at the range seen in training)
there and are exact here, which moves the labels of a few pixels in a thousand.
"""

import dataclasses
import struct
import zipfile
import zlib
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from deeplabzoo.checkpoints.converters.key_mapping import assume_classes
from deeplabzoo.checkpoints.converters.tensorflow.tflite_graph import MAGIC, MAX_FILE_BYTES, Graph
from deeplabzoo.checkpoints.converters.tensorflow.tflite_layers import CONVOLUTION, DEPTHWISE, Layer, read_layers
from deeplabzoo.checkpoints.converters.tensorflow.tflite_mobilenetv2 import (
    Features,
    StateDict,
    conv_and_identity_norm,
    encoder_state,
    is_pointwise,
    match_encoder,
    read_features,
)
from deeplabzoo.checkpoints.types import Checkpoint
from deeplabzoo.data.classes import Palette, default_palette
from deeplabzoo.errors import UsageError, WeightsError
from deeplabzoo.models.config import DeepLabConfig, Preprocessing

# DeepLab's head recognised in a graph's layers: pyramid branches, their order, rates and resizing, and the classifier.


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
    if not _concatenates_branches(output):
        return None
    resizes: list[Layer] = []
    classifier = _skip_resizes(output, resizes)
    if not is_pointwise(classifier, ""):
        raise _mismatch_error(classifier, "a linear 1x1 convolution to class scores")
    project, refine = classifier.sources[0], None
    if project.kind == CONVOLUTION and project.kernel == (3, 3):
        project, refine = project.sources[0], _keeps_size(project)
    if not is_pointwise(project, "RELU") or project.sources[0].kind != "CONCATENATION":
        raise _mismatch_error(
            project, "a 1x1 convolution with RELU on the joined branches (decoders of DeepLabV3+ are not read)"
        )
    branches = [_branch(source) for source in project.sources[0].sources]
    pooled = [index for index, branch in enumerate(branches) if branch.is_pool]
    pointwise = [index for index, branch in enumerate(branches) if not branch.is_pool and branch.layers[0].kernel == (1, 1)]
    atrous = [index for index in range(len(branches)) if index not in pooled + pointwise]
    if len(pooled) != 1 or len(pointwise) != 1 or any(branch.feature is not branches[0].feature for branch in branches):
        raise _mismatch_error(
            project.sources[0], "one image pooling branch, one 1x1 branch and atrous ones on the same feature"
        )
    widths = {_outputs(one) for one in (project, refine or project, *(branch.layers[-1] for branch in branches))}
    if len(widths) > 1 or len({len(branches[index].layers) for index in atrous}) > 1:
        raise _mismatch_error(project.sources[0], "branches of one form and of the projection's width")
    pooling_first = pooled[0] == 0
    order = pooled + pointwise + atrous if pooling_first else pointwise + atrous + pooled
    align_corners, notes = _read_align_corners(resizes)
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
        state |= conv_and_identity_norm(layer, shape, f"head.{name}.conv", f"head.{name}.norm", config.norm_eps)
    return state


def _branch(layer: Layer) -> _Branch:
    layer = _skip_resizes(layer, [])
    if layer.kind == CONVOLUTION and layer.kernel == (3, 3):
        return _Branch(layer.sources[0], (_keeps_size(layer),))
    if not is_pointwise(layer, "RELU"):
        raise _mismatch_error(layer, "a branch that ends in a 1x1 or 3x3 convolution with RELU")
    source = layer.sources[0]
    if source.kind in POOLING:
        if any(side != 1 for side in source.shape[1:-1]):
            raise _mismatch_error(source, "a mean over the whole map")
        return _Branch(source.sources[0], (layer,), is_pool=True)
    if source.kind == DEPTHWISE and source.activation == "RELU":
        return _Branch(source.sources[0], (_keeps_size(source), layer))
    return _Branch(source, (layer,))


def _keeps_size(layer: Layer) -> Layer:
    reach = layer.dilation * (layer.kernel[0] // 2)
    if layer.kernel != (3, 3) or layer.activation != "RELU" or layer.stride != 1 or layer.padding != 4 * (reach,):
        raise _mismatch_error(layer, "a 3x3 convolution with RELU that keeps the map's size")
    return layer


def _reordered(project: Layer, order: list[int]) -> Layer:
    assert project.weight is not None
    outputs, inputs = project.weight.shape[:2]
    if inputs != len(order) * outputs:
        raise _mismatch_error(project, f"{len(order) * outputs} input channels")
    weight = project.weight.reshape(outputs, len(order), outputs, 1, 1)[:, order].reshape(project.weight.shape)
    return replace(project, weight=np.ascontiguousarray(weight))


def _skip_resizes(layer: Layer, resizes: list[Layer]) -> Layer:
    while layer.kind == "RESIZE_BILINEAR":
        resizes.append(layer)
        layer = layer.sources[0]
    return layer


def _read_align_corners(resizes: list[Layer]) -> tuple[bool, tuple[str, ...]]:
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


def _concatenates_branches(output: Layer) -> bool:
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


def _mismatch_error(layer: Layer, expected: str) -> WeightsError:
    return WeightsError(f"This is not a DeepLabV3 head: {layer} stands where {expected} was expected.")


FORMAT_NAME = "tflite"
_POST_LOGIT_OPS = ("ARG_MAX", "SOFTMAX", "LOGISTIC")
_MAX_LABEL_BYTES = 1 << 16
_MAX_SIDE = 1 << 14


def can_convert(path: Path) -> bool:
    """Whether a file is a TensorFlow Lite model, by its magic bytes; False for files that cannot be read."""
    try:
        with path.open("rb") as file:
            return file.read(8)[4:] == MAGIC
    except OSError:
        return False


def convert(path: Path) -> Checkpoint:
    """Read a DeepLab (a model of ours and its weights) or a classifier (an encoder's weights) of MobileNetV2.

    Raises WeightsError in one sentence if the file cannot be read, is damaged, or holds another model.
    """
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise WeightsError(f"{path.name} has more than {MAX_FILE_BYTES >> 20} MiB, too many for a mobile model.")
        data = path.read_bytes()
    except OSError as error:
        raise WeightsError(f"{path} cannot be read: {error.strerror}.") from None
    graph = Graph(data)
    image, output = read_layers(graph)
    if len(image.shape) != 4 or image.shape[3] != 3 or not all(1 < side <= _MAX_SIDE for side in image.shape[1:3]):
        raise WeightsError(
            f"The TensorFlow Lite file's input has shape {image.shape}; expected 1 x height x width x 3 in pixels."
        )
    dropped: list[str] = []
    while output.kind in _POST_LOGIT_OPS:
        dropped.append(output.kind)
        output = output.sources[0]
    try:
        head = read_head(output)
        return _encoder(graph, output, dropped) if head is None else _deeplab(path, graph, head, dropped)
    except UsageError as error:
        raise WeightsError(f"The model in {path.name} cannot be built here: {error}") from error


def _deeplab(path: Path, graph: Graph, head: Head, dropped: list[str]) -> Checkpoint:
    features = read_features(head.feature)
    preprocessing, notes = _preprocessing(features.image, is_float=_is_float(graph))
    config = DeepLabConfig(
        architecture="deeplabv3",
        encoder="mobilenetv2_100",  # match_encoder puts the right width here
        num_classes=head.num_classes,
        output_stride=_output_stride(features),
        atrous_rates=head.rates,
        head_channels=head.channels,
        aspp_separable=head.separable,
        pooling_first=head.pooling_first,
        refine_conv=head.refine is not None,
        align_corners=head.align_corners,
        encoder_padding=features.padding,
    )
    config, encoder = match_encoder(features, config)
    state = encoder_state(features, encoder)
    weights = {f"encoder.{name}": tensor for name, tensor in state.items()}
    feature_channels = next(reversed([tensor for tensor in state.values() if tensor.ndim == 4])).shape[0]
    classes, palette, class_notes = _classes(path, head.num_classes)
    return Checkpoint(
        format_name=FORMAT_NAME,
        config=config,
        encoder=config.encoder,
        state_dict=weights | head_state(head, config, feature_channels),
        classes=classes,
        palette=palette,
        preprocessing=dataclasses.replace(preprocessing, resize="longest", only_shrink=True, pad=True),
        dropped=tuple(dropped),
        notes=(*head.notes, *notes, *class_notes, *_zero_padding_note(features, state, config.encoder)),
    )


def _encoder(graph: Graph, output: Layer, dropped: list[str]) -> Checkpoint:
    layer = output
    if layer.kind == CONVOLUTION and layer.sources[0].kind in POOLING:
        dropped.append(f"classifier {_widths(layer)}")
        layer = layer.sources[0]
    if layer.kind in POOLING:
        dropped.append("image pooling")
        layer = layer.sources[0]
    if is_pointwise(layer, "RELU6"):
        dropped.append(f"conv_head {_widths(layer)}")
        layer = layer.sources[0]
    features = read_features(layer)
    preprocessing, notes = _preprocessing(features.image, is_float=_is_float(graph))
    config = DeepLabConfig(
        architecture="deeplabv3",
        encoder="mobilenetv2_100",  # match_encoder puts the right width here
        output_stride=_output_stride(features),
        encoder_padding=features.padding,
    )
    config, encoder = match_encoder(features, config)
    state = encoder_state(features, encoder)
    return Checkpoint(
        format_name=FORMAT_NAME,
        config=None,
        encoder=config.encoder,
        state_dict=state,
        classes=None,
        palette=None,
        preprocessing=preprocessing,
        dropped=tuple(dropped),
        notes=(*notes, *_zero_padding_note(features, state, config.encoder)),
    )


def _is_float(graph: Graph) -> bool:
    return not graph.tensors[graph.inputs[0]].is_quantised


def _output_stride(features: Features) -> int:
    if features.output_stride not in (8, 16, 32):
        raise WeightsError(f"The encoder's strides multiply to {features.output_stride}; expected 8, 16 or 32.")
    return features.output_stride


def _widths(layer: Layer) -> str:
    assert layer.weight is not None
    return f"({layer.weight.shape[1]} -> {layer.weight.shape[0]})"


def _zero_padding_note(features: Features, state: StateDict, encoder: str) -> tuple[str, ...]:
    own = sum(layer.weight.shape[0] for layer in features.convolutions() if layer.weight is not None)
    ours = sum(tensor.shape[0] for tensor in state.values() if tensor.ndim == 4)
    return () if own == ours else (f"the file's {own} channels are filled with zero channels to the {ours} of {encoder}",)


def _preprocessing(image: Layer, *, is_float: bool) -> tuple[Preprocessing, tuple[str, ...]]:
    """Return the input's size and scaling: pixels 0 to 255 span the range of the 8-bit form, then the graph's factors apply."""
    low, high = image.value_range or ((-1.0, 1.0) if image.weight is None else (0.0, 255.0))
    notes: tuple[str, ...] = ()
    if is_float or image.value_range is None:
        notes = (f"the file's input is not 8-bit: pixels 0 to 255 assumed to be fed as {low:.4g} to {high:.4g}",)
    factor = np.ones(3) if image.weight is None else image.weight.reshape(-1).astype(np.float64)
    offset = np.zeros(3) if image.bias is None else image.bias.astype(np.float64)
    gain, start = factor * (high - low), factor * low + offset
    if not (gain > 1e-6).all():
        raise WeightsError("The model scales its input by zero or a negative number; it cannot be converted.")
    height, width = image.shape[1:3]
    return Preprocessing(size=(height, width), mean=_triple(-start / gain), std=_triple(1 / gain)), notes


def _triple(values: NDArray[np.float64]) -> tuple[float, float, float]:
    red, green, blue = (float(value) for value in values)
    return red, green, blue


def _classes(path: Path, num_classes: int) -> tuple[tuple[str, ...], Palette, tuple[str, ...]]:
    labels = _attached_labels(path, num_classes)
    if labels is not None:
        return labels, default_palette(num_classes), ()
    return assume_classes(num_classes)


def _attached_labels(path: Path, num_classes: int) -> tuple[str, ...] | None:
    """Return the class names of a text file with one line a class that TensorFlow's metadata writer appends as a zip."""
    try:
        with zipfile.ZipFile(path) as attached:
            plain = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
            texts = [one for one in attached.infolist() if one.filename.endswith(".txt") and one.compress_type in plain]
            for entry in texts[:16]:
                with attached.open(entry) as file:
                    lines = file.read(_MAX_LABEL_BYTES).decode("utf-8").strip().splitlines()
                names = tuple(line.strip() for line in lines)
                if len(set(names)) == num_classes == len(names) and all(names):
                    return names
    except (zipfile.BadZipFile, zlib.error, struct.error, OSError, ValueError, RuntimeError, EOFError):
        return None  # the attachment is optional: without a readable one, names are inferred, which is logged
    return None
