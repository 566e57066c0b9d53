"""TensorFlow Lite files of MobileNetV2: DeepLab segmentation networks, and classifiers as encoders for new ones.

Everything is read off the graph: the blocks and their dilations, the head's branches and their order, how maps are resized,
the input's scaling and the number of classes. Weights may be float32, float16, 8-bit per tensor or per channel, with or without
a final ARG_MAX or SOFTMAX. A float file does not say how its input is scaled; [-1, 1], TensorFlow's convention for MobileNetV2,
is assumed and said. Class names come from a label list attached to the file, or are VOC's for 21 classes, or `class_0` and
so on.

What is left behind by quantisation cannot be recovered: activations were rounded (and cut off at the range seen in training)
there and are exact here, which moves the labels of a few pixels in a thousand.
"""

import dataclasses
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from deeplabzoo.data.palettes import Palette, default_palette
from deeplabzoo.errors import UsageError, WeightsError
from deeplabzoo.models.config import DeepLabConfig, Preprocessing
from deeplabzoo.zoo.origins.class_names import inferred_classes
from deeplabzoo.zoo.origins.converted import Converted
from deeplabzoo.zoo.origins.tflite_graph import MAGIC, MAX_FILE_BYTES, Graph
from deeplabzoo.zoo.origins.tflite_head import POOLING, Head, head_state, read_head
from deeplabzoo.zoo.origins.tflite_layers import CONVOLUTION, Layer, read_layers
from deeplabzoo.zoo.origins.tflite_mobilenetv2 import (
    Features,
    StateDict,
    encoder_state,
    is_pointwise,
    match_encoder,
    read_features,
)

ORIGIN = "tflite"
_AFTER_LOGITS = ("ARG_MAX", "SOFTMAX", "LOGISTIC")
_MAX_LABEL_BYTES = 1 << 16
_MAX_SIDE = 1 << 14


def recognise(path: Path) -> bool:
    """Whether a file is a TensorFlow Lite model, by its magic bytes; False for files that cannot be read."""
    try:
        with path.open("rb") as file:
            return file.read(8)[4:] == MAGIC
    except OSError:
        return False


def convert(path: Path) -> Converted:
    """Read a DeepLab (a network of ours and its weights) or a classifier (an encoder's weights) of MobileNetV2.

    Raises WeightsError in one sentence if the file cannot be read, is damaged, or holds another network.
    """
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise WeightsError(f"{path.name} has more than {MAX_FILE_BYTES >> 20} MiB, too many for a mobile network.")
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
    while output.kind in _AFTER_LOGITS:
        dropped.append(output.kind)
        output = output.sources[0]
    try:
        head = read_head(output)
        return _encoder(graph, output, dropped) if head is None else _deeplab(path, graph, head, dropped)
    except UsageError as error:
        raise WeightsError(f"The network in {path.name} cannot be built here: {error}") from error


def _deeplab(path: Path, graph: Graph, head: Head, dropped: list[str]) -> Converted:
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
    return Converted(
        origin=ORIGIN,
        config=config,
        encoder=config.encoder,
        state_dict=weights | head_state(head, config, feature_channels),
        classes=classes,
        palette=palette,
        preprocessing=dataclasses.replace(preprocessing, resize="longest", only_shrink=True, pad=True),
        dropped=tuple(dropped),
        notes=(*head.notes, *notes, *class_notes, *_widths_note(features, state, config.encoder)),
    )


def _encoder(graph: Graph, output: Layer, dropped: list[str]) -> Converted:
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
    return Converted(
        origin=ORIGIN,
        config=None,
        encoder=config.encoder,
        state_dict=state,
        classes=None,
        palette=None,
        preprocessing=preprocessing,
        dropped=tuple(dropped),
        notes=(*notes, *_widths_note(features, state, config.encoder)),
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


def _widths_note(features: Features, state: StateDict, encoder: str) -> tuple[str, ...]:
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
        raise WeightsError("The network scales its input by zero or a negative number; it cannot be converted.")
    height, width = image.shape[1:3]
    return Preprocessing(size=(height, width), mean=_triple(-start / gain), std=_triple(1 / gain)), notes


def _triple(values: NDArray[np.float64]) -> tuple[float, float, float]:
    red, green, blue = (float(value) for value in values)
    return red, green, blue


def _classes(path: Path, num_classes: int) -> tuple[tuple[str, ...], Palette, tuple[str, ...]]:
    labels = _attached_labels(path, num_classes)
    if labels is not None:
        return labels, default_palette(num_classes), ()
    return inferred_classes(num_classes)


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
        return None  # the attachment is optional: without a readable one, names are inferred and that is said
    return None
